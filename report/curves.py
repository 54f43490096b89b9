"""A run's curves, as SVG: accuracy, what corrections change, reward, signal, lengths, speed.

    pip install matplotlib
    python -m report out/run         # puts them into the run's page
    python -m tools.pictures         # draws README's pictures with the same functions

A chart is a line of the table `CHARTS`: a title, a unit, and the fields of metrics.jsonl it shows.
A field that every layer has is named with {k}, and each layer of the run gets its line. Training
fields are noisy, so they are drawn twice: thin as they are, thick as a mean over a fifteenth of the
run. Held-out fields are points with standard errors. The lower axis counts generated tokens, the
cost of a run; the upper axis counts steps.

matplotlib writes colours into the file. Here each colour is a mark, which becomes a CSS variable,
so that a page can turn dark (`in_page`), or the colour itself for a file of its own (`alone`). The
palette is that of Okabe and Ito, which colour-blind people can tell apart.
"""

import io
import re
from typing import NamedTuple

import numpy as np

from eval import as_metrics

# Marks, not colours. matplotlib takes nothing but colours, and keeps these as they are.
INK, GRID, PAPER = "#010101", "#020202", "#030303"
LINES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
VARIABLES = {INK: "--ink", GRID: "--grid", PAPER: "--paper"}
VARIABLES |= {mark: f"--line{i}" for i, mark in enumerate(LINES)}
COLOURS = {INK: "#222222", GRID: "#dddddd", PAPER: "#ffffff"}
COLOURS |= dict(zip(LINES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")))
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
POINTS = 400  # of a curve at most: a longer run is drawn as means of neighbouring steps
LOOKS = 60  # held-out points at most: of more, evenly spaced ones are drawn


class Chart(NamedTuple):
    """What one picture shows: for each field a label and the number of its first colour.

    A field or label with {k} stands for one line in each layer.
    """

    name: str
    unit: str
    fields: dict  # of metrics.jsonl, every step
    held_out: dict = {}  # of metrics.jsonl, after the steps with an evaluation
    log: bool = False
    share: bool = False  # an axis from 0 to 1


class Series(NamedTuple):
    """One line of a picture."""

    field: str
    label: str
    colour: str


CHARTS = (
    Chart(
        "Accuracy in training",
        "share right",
        {"accuracy{k}": ("layer {k}", 0)},
        share=True,
    ),
    Chart(
        "Accuracy on held-out questions",
        "share right, greedy",
        {},
        {"heldout{k}": ("Acc@t{k}", 0)},
        share=True,
    ),
    Chart(
        "What corrections change",
        "share of answers",
        {"fix{k}": ("i→c", 2), "broke{k}": ("c→i", 3)},
        {"heldout_fix{k}": ("held out, i→c", 2), "heldout_broke{k}": ("held out, c→i", 3)},
    ),
    Chart(
        "What reviews say",
        "share of corrections",
        {
            "no_right{k}": ("no to a right answer", 2),
            "no_wrong{k}": ("no to a wrong answer", 3),
            "fresh{k}": ("a new answer, after no", 4),
        },
        share=True,
    ),
    Chart("Reward", "mean of a rollout", {"reward{k}": ("layer {k}", 0)}),
    Chart("Groups with a signal", "share", {"signal{k}": ("layer {k}", 0)}, share=True),
    Chart("Entropy", "nats per trained token", {"entropy": ("policy", 0)}),
    Chart("KL from the reference", "nats per trained token", {"kl": ("policy", 0)}),
    Chart(
        "Sampler against trainer",
        "|Δ log π| of a token",
        {"gauge_max": ("largest", 1), "gauge_mean": ("mean", 0)},
        log=True,
    ),
    Chart("Gradient", "norm before clipping", {"grad_norm": ("norm", 0)}),
    Chart("Clipped tokens", "share", {"clipped": ("beyond the clip", 1)}),
    Chart("Truncated answers", "share", {"truncated{k}": ("layer {k}", 0)}),
    Chart("Length of answers", "tokens", {"length{k}": ("layer {k}", 0)}),
    Chart("Speed", "generated tokens per second", {"tokens_per_s": ("sampling and training", 0)}),
    Chart(
        "Time of a step",
        "seconds",
        {"seconds_sampling": ("sampling", 0), "seconds_training": ("training", 1)},
    ),
    Chart("Memory", "GB, peak so far", {"peak_gb": ("in use", 0)}),
)


def available():
    """Whether matplotlib is installed, and can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def charts(metrics, result):
    """The lines of a run's metrics.jsonl and its result.json -> [(Chart, svg)] of the charts that
    have something to show. KL is 0 throughout without a reference, and is left out."""
    lines = with_ends(metrics, result)
    return [
        (chart, in_page(draw(chart, [("", lines)]), chart.name))
        for chart in CHARTS
        if shown(chart, lines)
    ]


def shown(chart, metrics):
    """Whether these lines have anything for a Chart."""
    fields = [s.field for s in series(chart.fields, metrics) + series(chart.held_out, metrics)]
    values = [line[field] for field in fields for line in metrics if line.get(field) is not None]
    return any(values) if chart.name == "KL from the reference" else bool(values)


def series(templates, metrics):
    """The fields of a chart, one for each layer -> [Series, ...] of those that these lines have.

    templates: {field: (label, first colour)}. Where a field has several layers and its label does
    not tell them apart, the label names the layer.
    """
    names = {name for line in metrics for name in line}
    chosen = []
    for template, (label, colour) in templates.items():
        if "{k}" not in template:
            chosen += [Series(template, label, LINES[colour])] if template in names else []
            continue
        # accuracy{k} stands for accuracy1, accuracy2, ..., as many as these lines have.
        pattern = re.compile(template.replace("{k}", r"([1-9]\d{0,2})"), re.ASCII)
        layers = sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)
        for place, k in enumerate(layers):
            suffix = ", layer {k}" if "{" not in label and len(layers) > 1 else ""
            text = (label + suffix).format(k=k)
            mark = LINES[(colour + place * len(templates)) % len(LINES)]
            chosen.append(Series(template.format(k=k), text, mark))
    return chosen


def with_ends(metrics, result):
    """The lines of metrics.jsonl with two more held-out points, greedy, from result.json: the table
    before the first step and the table after the last."""
    last = metrics[-1] if metrics else dict(generated=0, step=0)
    ends = [
        (
            dict(generated=0, step=0)
            if name == "base"
            else {k: last[k] for k in ("generated", "step")}
        )
        | as_metrics(tables["greedy"])
        for name, tables in result.items()
        if "t1" in tables.get("greedy", ())
    ]
    return sorted([*metrics, *ends], key=lambda line: line["step"])


# ---- one picture ---------------------------------------------------------------------------------


def draw(chart, runs, size=(5.4, 3.3)):
    """A Chart of [(name, metrics)] -> matplotlib figure. The second run is drawn dashed, in the
    colours of the first."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size)
        for (name, metrics), style in zip(runs, ("-", "--")):
            # $ would begin a formula
            behind = "" if len(runs) == 1 else f", {name}".replace("$", r"\$")
            fill(axes, chart, metrics, style, behind)
        finish(axes, chart, runs[0][1])
    return figure


def new_figure(size):
    """-> matplotlib figure and its axes; no window is opened, whatever the machine has."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots()


def fill(axes, chart, metrics, style, behind):
    """Draws what a Chart shows of one run into axes. behind: goes behind every label."""
    # Training: curves.
    for field, label, colour in series(chart.fields, metrics):
        x, y, _ = column(metrics, field)
        if len(x):
            y = thinned(y, np.max if field.endswith("_max") else np.mean)
            steps_of_training(axes, thinned(x), y, colour, style, label + behind)
    # Evaluations: points with standard errors, joined where the chart has no curve.
    for field, label, colour in series(chart.held_out, metrics):
        x, y, error = map(evenly_spaced, column(metrics, field))
        axes.errorbar(
            x,
            y,
            error,
            fmt="o",
            ms=4,
            ls="none" if chart.fields else style,
            lw=1.5,
            capsize=2,
            color=colour,
            markerfacecolor=colour if style == "-" else PAPER,
            label=label + behind,
        )


def column(metrics, field):
    """-> generated tokens, values, standard errors (0 where unknown) of the lines with this
    field."""
    lines = [line for line in metrics if line.get(field) is not None]
    return (
        np.array([line["generated"] for line in lines], float),
        np.array([line[field] for line in lines], float),
        np.array([line.get(f"{field}_se") or 0.0 for line in lines]),
    )


def evenly_spaced(values):
    """At most LOOKS of them, the first and the last among them."""
    if len(values) <= LOOKS:
        return values
    return values[np.linspace(0, len(values) - 1, LOOKS).round().astype(int)]


def steps_of_training(axes, x, y, colour, style, label):
    """A noisy curve: thin as it is, thick as a running mean. A single step is a point."""
    axes.plot(x, y, color=colour, lw=0.7, alpha=0.35, marker="o" if len(x) == 1 else None)
    axes.plot(x, running_mean(y, max(1, len(y) // 15)), color=colour, lw=2, ls=style, label=label)


def thinned(values, combine=np.mean):
    """At most POINTS values: means (or maxima, ...) of neighbours."""
    if len(values) <= POINTS:
        return values
    return np.array([combine(part) for part in np.array_split(values, POINTS)])


def running_mean(y, width):
    """The mean over `width` values around each, fewer at the ends."""
    # A window at an end holds fewer values: the second convolution counts them.
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
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
    # A logarithmic axis needs something above 0.
    if chart.log and max((y.max() for y in drawn), default=0) > 0:
        axes.set_yscale("log")
    elif chart.share:
        axes.set_ylim(0, 1.02)
    elif min((y.min() for y in drawn), default=0) >= 0:
        axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower left", ncols=2)
    tokens, steps = (
        np.array(sorted({line[name] for line in metrics}), float) for name in ("generated", "step")
    )
    if len(tokens) == len(steps) > 1:
        # Another run in the picture may go on for longer: beyond the first run's end a step takes
        # its average number of tokens.
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
    """A figure as the text of an SVG element, the same for the same figure. `salt` goes into its
    ids, so that several fit into one page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(
            file, format="svg", metadata=dict(Date=None, Creator=None, Format=None, Type=None)
        )
    # Without date and version, and with the ids of a fixed salt: the same figure is the same bytes.
    text = file.getvalue()
    # figure_1, axes_1, ...: nothing refers to them
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    return re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", text)


def in_page(figure, salt):
    """A figure as SVG whose colours are CSS variables of the page and whose width is that of its
    place."""
    # its style would be the whole page's
    text = re.sub(r"<style.*?</style>\s*", "", svg(figure, salt), flags=re.S)
    for mark, variable in VARIABLES.items():
        text = text.replace(mark, f"var({variable})")
    # Without a size of its own the picture takes the width of its place.
    start, end = text.index("<svg"), text.index(">") + 1
    return re.sub(r' (width|height)="[\d.]+pt"', "", text[start:end]) + text[end:]


def alone(figure, path):
    """Writes a figure as an SVG file with colours on white."""
    text = svg(figure, path.stem)
    for mark, colour in COLOURS.items():
        text = text.replace(mark, colour)
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + text, encoding="utf-8")
