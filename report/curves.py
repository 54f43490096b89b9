"""A run's curves, as SVG: accuracy, what the second look changes, entropy, the gauge, signal,
lengths, speed, memory.

    pip install matplotlib
    python report.py out/run         # puts them into the page; python pictures.py draws those of
                                     README

The idea. A chart is a line of the table `CHARTS`: a title, a unit, and which fields of
metrics.jsonl it shows. Training fields are noisy, so they are drawn twice: thin as they are, thick
as a mean over a fifteenth of the run. Held-out fields are points with standard errors. The lower
axis counts generated tokens, what a run costs; the upper one steps. A second run is drawn dashed,
in the same colours.

matplotlib writes colours into the file; here each is a mark that becomes a CSS variable, so that a
page can turn dark (`in_page`), or the colour itself for a file that stands alone (`alone`). The
palette is Okabe and Ito's, which colour-blind people can tell apart.
"""

import io
import re
from typing import NamedTuple

import numpy as np

from tables import as_look

# marks, not colours
INK, GRID, PAPER, LINES = (
    "#010101",
    "#020202",
    "#030303",
    ("#040404", "#050505", "#060606", "#070707"),
)
VARIABLES = {INK: "--ink", GRID: "--grid", PAPER: "--paper"} | {
    mark: f"--line{i}" for i, mark in enumerate(LINES)
}
COLOURS = {INK: "#222222", GRID: "#dddddd", PAPER: "#ffffff"} | dict(
    zip(LINES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
)
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
}
POINTS = 400  # of a curve, at most; a longer run is drawn as means of neighbouring steps
LOOKS = 60  # at held-out questions, at most; of more, evenly spaced ones are drawn


class Chart(NamedTuple):
    """What one picture shows: for each field a label and the number of its colour."""

    name: str
    unit: str
    fields: dict  # of metrics.jsonl, every step
    looks: dict = {}  # of metrics.jsonl, where somebody looked at held-out questions
    log: bool = False
    share: bool = False  # an axis from 0 to 1


CHARTS = (
    Chart(
        "Accuracy in training",
        "share right",
        dict(accuracy1=("attempts", 0), accuracy2=("corrections", 1)),
        share=True,
    ),
    Chart(
        "Accuracy on held-out questions",
        "share right, greedy",
        {},
        dict(heldout1=("Acc@t1", 0), heldout2=("Acc@t2", 1)),
        share=True,
    ),
    Chart(
        "What the second look changes",
        "share of answers",
        dict(fix=("mends, i→c", 2), broke=("breaks, c→i", 3)),
        dict(heldout_fix=("held out, i→c", 2), heldout_broke=("held out, c→i", 3)),
    ),
    Chart("Reward", "mean of a rollout", dict(reward1=("attempts", 0), reward2=("corrections", 1))),
    Chart(
        "Groups with a signal",
        "share",
        dict(signal1=("layer 1", 0), signal2=("layer 2", 1)),
        share=True,
    ),
    Chart("Entropy", "nats a trained token", dict(entropy=("policy", 0))),
    Chart("KL from the reference", "nats a trained token", dict(kl=("policy", 0))),
    Chart(
        "Sampler against trainer",
        "|Δ log π| of a token",
        dict(gauge_max=("largest", 1), gauge_mean=("mean", 0)),
        log=True,
    ),
    Chart("Gradient", "norm before clipping", dict(grad_norm=("norm", 0))),
    Chart("Clipped tokens", "share", dict(clipped=("beyond the clip", 1))),
    Chart("Answers cut at the limit", "share", dict(cut1=("attempts", 0), cut2=("corrections", 1))),
    Chart("Length of answers", "tokens", dict(length1=("attempts", 0), length2=("corrections", 1))),
    Chart("Speed", "generated tokens a second", dict(tokens_per_s=("sampling and training", 0))),
    Chart(
        "Time of a step",
        "seconds",
        dict(seconds_sampling=("sampling", 0), seconds_training=("training", 1)),
    ),
    Chart("Memory", "GB at most so far", dict(peak_gb=("in use", 0))),
)


def available():
    """Whether matplotlib is installed, and can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def charts(runs):
    """[(name, metrics, result)] of one or two runs, metrics being the lines of metrics.jsonl ->
    [(Chart, svg)] of those with something to show. A reference that is not there has no KL."""
    runs = [(name, with_ends(metrics, result)) for name, metrics, result in runs]
    return [
        (chart, in_page(draw(chart, runs), chart.name))
        for chart in CHARTS
        if any(shown(chart, metrics) for _, metrics in runs)
    ]


def shown(chart, metrics):
    """Whether these lines have anything for a Chart."""
    values = [line.get(field) for line in metrics for field in {**chart.fields, **chart.looks}]
    return any(
        value is not None and (value or chart.name != "KL from the reference") for value in values
    )


def with_ends(metrics, result):
    """The lines with two more for held-out questions, before the first step and after the last:
    greedy, from the tables of result.json."""
    ends = [
        (found["greedy"], 0 if name == "base" else None)
        for name, found in result.items()
        if "t2" in found.get("greedy", ())
    ]
    at = lambda place, line: (line["generated"], line["step"]) if place is None else (0, 0)
    more = [
        dict(
            zip(
                ("generated", "step"),
                at(place, metrics[-1] if metrics else dict(generated=0, step=0)),
            )
        )
        | as_look(found)
        for found, place in ends
    ]
    return sorted([*metrics, *more], key=lambda line: line["step"])


# ---- one picture ---------------------------------------------------------------------------------


def draw(chart, runs, size=(5.4, 3.3)):
    """A Chart of [(name, metrics)] -> matplotlib figure."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size)
        fill(axes, chart, runs)
        finish(axes, chart, runs[0][1])
    return figure


def new_figure(size):
    """-> matplotlib figure and its axes; no window is opened, whatever the machine has."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots()


def fill(axes, chart, runs):
    """Draws what a Chart shows of [(name, metrics)] into axes."""
    for (name, metrics), style in zip(runs, ("-", "--")):
        behind = "" if len(runs) == 1 else f", {name}".replace("$", r"\$")  # $ begins a formula
        for field, (label, colour) in chart.fields.items():
            x, y, _ = column(metrics, field)
            if len(x):
                steps_of_training(
                    axes,
                    thinned(x),
                    thinned(y, np.max if field.endswith("_max") else np.mean),
                    LINES[colour],
                    style,
                    label + behind,
                )
        for field, (label, colour) in chart.looks.items():
            x, y, error = map(some, column(metrics, field))
            alone = not chart.fields
            axes.errorbar(
                x,
                y,
                error,
                fmt="o",
                ms=4,
                ls=style if alone else "none",
                lw=1.5,
                capsize=2,
                color=LINES[colour],
                markerfacecolor=LINES[colour] if style == "-" else PAPER,
                label=label + behind,
            )


def column(metrics, field):
    """-> generated tokens, values, standard errors (0 where none is known) of the lines that have
    this field."""
    there = [line for line in metrics if line.get(field) is not None]
    return (
        np.array([line["generated"] for line in there], float),
        np.array([line[field] for line in there], float),
        np.array([line.get(f"{field}_se") or 0.0 for line in there]),
    )


def some(values):
    """At most LOOKS of them, evenly spaced, the first and the last among them."""
    return (
        values[np.linspace(0, len(values) - 1, LOOKS).round().astype(int)]
        if len(values) > LOOKS
        else values
    )


def steps_of_training(axes, x, y, colour, style, label):
    """A noisy curve: thin as it is, thick as a running mean. A single step is a point."""
    axes.plot(x, y, color=colour, lw=0.7, alpha=0.35, marker="o" if len(x) == 1 else None)
    axes.plot(x, running_mean(y, max(1, len(y) // 15)), color=colour, lw=2, ls=style, label=label)


def thinned(values, how=np.mean):
    """At most POINTS: means (or largest, ...) of neighbours."""
    return (
        np.array([how(part) for part in np.array_split(values, POINTS)])
        if len(values) > POINTS
        else values
    )


def running_mean(y, width):
    """The mean over `width` values around each, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def finish(axes, chart, metrics):
    """Axes, legend, and above the picture the steps of the first run."""
    axes.set_xlabel("generated tokens")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x else "0"
    )
    axes.locator_params(axis="x", nbins=6)
    if (
        chart.log
        and max((line.get_ydata().max() for line in axes.lines if len(line.get_ydata())), default=0)
        > 0
    ):
        axes.set_yscale("log")
    elif chart.share:
        axes.set_ylim(0, 1.02)
    elif (
        axes.get_ylim()[0] >= 0
        or min((line.get_ydata().min() for line in axes.lines if len(line.get_ydata())), default=0)
        >= 0
    ):
        axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower left", ncols=2)
    tokens, steps = (
        np.array(sorted({line[name] for line in metrics}), float) for name in ("generated", "step")
    )
    if len(tokens) == len(steps) > 1:
        # beyond them as on average
        tokens, steps = (
            np.concatenate([[-1e6 * x[-1]], x, [1e6 * x[-1]]]) for x in (tokens, steps)
        )
        above = axes.secondary_xaxis(
            "top",
            functions=(
                lambda x: np.interp(x, tokens, steps),
                lambda s: np.interp(s, steps, tokens),
            ),
        )
        above.tick_params(labelsize=9)
        above.set_xlabel("step", fontsize=9)
        above.patch.set_visible(False)


# ---- into a file ---------------------------------------------------------------------------------


def svg(figure, salt):
    """A figure as the text of an SVG element, the same for the same figure; `salt` goes into its
    ids, so that several fit into one page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(
            file, format="svg", metadata=dict(Date=None, Creator=None, Format=None, Type=None)
        )
    text = file.getvalue()
    # figure_1, axes_1, ...: nobody refers to them
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    return re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", text)


def in_page(figure, salt):
    """A figure as SVG whose colours are CSS variables of the page and whose width is that of its
    place."""
    # it would be the whole page's
    text = re.sub(r"<style.*?</style>\s*", "", svg(figure, salt), flags=re.S)
    for mark, variable in VARIABLES.items():
        text = text.replace(mark, f"var({variable})")
    return re.sub(
        r'<svg (.*?)width="[\d.]+pt" height="[\d.]+pt"',
        r"<svg \1",
        re.sub(r'<svg height="[\d.]+pt"', "<svg", text),
        count=1,
    )


def alone(figure, path):
    """Writes a figure as an SVG file with colours on white."""
    text = svg(figure, path.stem)
    for mark, colour in COLOURS.items():
        text = text.replace(mark, colour)
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + text, encoding="utf-8")
