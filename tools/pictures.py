"""README's pictures, drawn from the results that are committed beside it.

    pip install -r requirements-extra.txt
    python pictures.py                       # writes docs/*.svg, and docs/report.png where there is
                                             a Chromium

The idea. A picture that cannot be made again cannot be believed. Each here is a function of files
under results/: a tree of a training step, the curves of one GRPO and one MGRPO run from the same
base, the comparison over seeds (compare.py), and the page of a run (report.py) as a browser shows
it. SVGs come out the same to the byte wherever the same matplotlib is installed, and a test holds
the committed ones to it.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import html
import io
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from report import curves
from report import page as report
from report.curves import COLOURS, INK, LINES
from runtime.flags import BadInput, guarded, parse_flags
from runtime.transcripts import lines_of
from eval import mean_and_error
from tools import compare

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("solve-grpo-0", "solve-mgrpo-0")
ARMS = ("grpo", "mgrpo", "keep", "raw", "wrong")
HEIGHT, SIGNS = 19, {True: ("✓", "#00664a"), False: ("✗", "#a33200")}


@dataclass(frozen=True)
class Config:
    results: str = str(ROOT / "results")  # folder of the committed results
    docs: str = str(ROOT / "docs")  # folder for the pictures


# ---- a tree --------------------------------------------------------------------------------------


def tree_picture(tree):
    """A tree as rollouts.jsonl has it -> SVG text: question, attempts, phrases, corrections, each
    with its verdict, reward, advantage."""
    lines = [(0, None, f"{tree['question']}    gold {tree['gold']}", "q")]
    for attempt in tree["attempts"]:
        lines.append((1, attempt, "", "attempt"))
        if "phrase" in attempt:
            lines.append((2, None, attempt["phrase"], "phrase"))
            lines += [(2, correction, "", "correction") for correction in attempt["corrections"]]
    body = "".join(tree_line(y, *line) for y, line in enumerate(lines))
    joints = "".join(
        branch(lines, i) for i, (depth, node, _, _) in enumerate(lines) if depth and node
    )
    size = f'viewBox="0 0 760 {HEIGHT * len(lines) + 24}" width="760"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="ui-monospace, monospace" font-size="12"><rect width="100%" '
        f'height="100%" fill="#ffffff"/>{joints}{body}</svg>\n'
    )


def tree_line(y, depth, node, text, kind):
    """One line of the picture."""
    x, baseline, colour, style = 14 + 34 * depth, 24 + HEIGHT * y, COLOURS[INK], ""
    if node:
        sign, colour = SIGNS[node["right"]]
        words = (
            "".join(node["tokens"])
            .replace("<|endoftext|>", "")
            .replace("<think>", "")
            .replace("</think>", "  →  ")
        )
        text = f"{sign} R={node['reward']:.0f} A={node['advantage']:+.2f}  {words.replace('<answer>', '').replace('</answer>', '')}"
    elif kind == "phrase":
        colour, style = "#666666", ' font-style="italic"'
    return f'<text x="{x}" y="{baseline}" fill="{colour}"{style} xml:space="preserve">{html.escape(text)}</text>'


def branch(lines, i):
    """The line from a node to what it goes on from: the nearest line above that is less deep."""
    depth = lines[i][0]
    above = max(j for j in range(i) if lines[j][0] < depth)
    x, y = 20 + 34 * (depth - 1), 20 + HEIGHT * i
    return f'<path d="M {x} {28 + HEIGHT * above} V {y} h 24" fill="none" stroke="{COLOURS[curves.GRID]}" stroke-width="1.5"/>'


# ---- charts --------------------------------------------------------------------------------------


def runs_picture(results, path):
    """Two runs from one base: held-out accuracy, and what the second look changes in training."""
    runs = []
    for name in RUNS:
        metrics = list(lines_of(results / name / "metrics.jsonl", ("step", "generated")))
        result = json.loads((results / name / "result.json").read_text())
        runs.append((name.split("-")[1].upper(), curves.with_ends(metrics, result)))
    chart = curves.Chart(
        "",
        "held out, greedy: share right",
        {},
        dict(heldout1=("Acc@t1", 0), heldout2=("Acc@t2", 1)),
        share=True,
    )
    curves.alone(curves.draw(chart, runs[::-1], (6.4, 3.6)), path)


def arms_picture(results, path):
    """Acc@t2 of each arm of compare.py, greedy and at temperature 1, mean and standard error over
    seeds, and GRPO's Acc@t1 as a line."""
    import matplotlib

    runs = [
        run
        for run in compare.read_lines(results / "compare-solve.jsonl")
        if run["arm"] in ARMS and not run["flags"]
    ]
    runs = compare.one_version(runs)
    with matplotlib.rc_context(curves.STYLE):
        figure, axes = curves.new_figure((6.4, 2.8))
        for mark, (label, key) in enumerate(
            (("greedy", "greedy"), ("temperature 1", "temperature 1"))
        ):
            means, errors = zip(*(seeds(runs, arm, key) for arm in ARMS))
            places = [i + 0.15 * (mark - 0.5) for i in range(len(ARMS))]
            axes.errorbar(
                places,
                means,
                errors,
                fmt="os"[mark],
                color=LINES[mark],
                ms=5,
                capsize=3,
                label=f"Acc@t2, {label}",
            )
        once = statistics.mean(
            run["result"]["greedy"]["t1"][0] for run in runs if run["arm"] == "grpo"
        )
        axes.axhline(once, color=LINES[2], lw=1.2, ls=":", label="GRPO's Acc@t1, greedy")
        axes.set_xticks(
            range(len(ARMS)),
            [f"{arm}\n{sum(run['arm'] == arm for run in runs)} seeds" for arm in ARMS],
        )
        axes.set_ylabel("share right")
        axes.set_ylim(0.5, 1)
        figure.legend(loc="outside lower left", ncols=3)
    curves.alone(figure, path)


def seeds(runs, arm, key):
    """Mean and standard error of Acc@t2 over the seeds of an arm."""
    import torch

    return mean_and_error(
        torch.tensor([run["result"][key]["t2"][0] for run in runs if run["arm"] == arm])
    )


# ---- the page ------------------------------------------------------------------------------------


def page_picture(results, path):
    """The page of the MGRPO run as a browser shows it: the first table, two curves, transcripts,
    tinted. Nothing without a browser."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    try:
        from PIL import Image
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if not chromium:
        return print(f"{path}: left as it is, since it takes playwright and a Chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        report.write_page([report.open_run(results / RUNS[1])], lambda text: None, output=str(page))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=dict(width=1040, height=1500))
        tab.goto(f"file://{page}")
        tab.click("[data-tint=entropy]")
        tab.evaluate(
            "document.querySelectorAll('figure, #table .wide').forEach((part, i) => part.hidden = "
            "![0, 3, 4].includes(i))"
        )
        tab.evaluate("window.scrollTo(0, 0)")
        # 128 colours: a third of the size
        Image.open(io.BytesIO(tab.screenshot())).quantize(128).save(path, optimize=True)
        browser.close()


def main():
    """Draws all of them, and says how large they are."""
    c = parse_flags(Config, __doc__)
    results, docs = Path(c.results), Path(c.docs)
    if not curves.available():
        raise BadInput("pictures.py draws with matplotlib: pip install matplotlib")
    if not (results / RUNS[1] / "rollouts.jsonl").exists():
        raise BadInput(
            f"--results {results}: {RUNS[1]}/rollouts.jsonl is not there; the repository has it"
        )
    docs.mkdir(parents=True, exist_ok=True)
    trees = lines_of(results / RUNS[1] / "rollouts.jsonl")
    # right ones and wrong ones
    mixed = next(
        tree for tree in trees if len({attempt["right"] for attempt in tree["attempts"]}) == 2
    )
    (docs / "tree.svg").write_text(tree_picture(mixed), encoding="utf-8")
    runs_picture(results, docs / "runs.svg")
    arms_picture(results, docs / "arms.svg")
    page_picture(results, docs / "report.png")
    print(
        *sorted(f"{path}: {path.stat().st_size / 1e3:.0f} kB" for path in docs.glob("*.*g")),
        sep="\n",
    )


if __name__ == "__main__":
    guarded(main)
