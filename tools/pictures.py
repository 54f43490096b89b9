"""README's pictures, drawn from the results that are committed beside it.

    pip install -r requirements-extra.txt
    python -m tools.pictures                  # writes docs/tree.svg, docs/runs.svg, docs/looks.svg

Each picture is a function of files under results/: a tree of a training step, the curves of a GRPO
run and an MGRPO run from the same base, and the comparison over seeds (tools/compare.py). The same
matplotlib draws the same bytes, and a test compares them with the committed pictures.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import html
import json
from dataclasses import dataclass
from pathlib import Path

from report import curves
from report.curves import COLOURS, INK, LINES
from report.trees import lines_of, read_trees, text_of
from runtime.flags import BadInput, guarded, parse_flags
from tasks.solve import Solve
from tools import compare, tables

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("solve-grpo-0", "solve-mgrpo-0")
LOOKS = {  # arm of compare.py, or control of controls.py -> its name in the picture
    "base": "base",
    "one": "base, best constant",
    "grpo": "GRPO",
    "question": "MGRPO 4,3",
    "chains": "chains 4,1,1,1",
}
HEIGHT = 19  # of a line of the tree, in pixels
SIGNS = {True: ("✓", "#00664a"), False: ("✗", "#a33200")}
# The tags of a response take room and say nothing here.
TAGS = {"<|endoftext|>": "", "<think>": "", "</think>": "  →  ", "<answer>": "", "</answer>": ""}


@dataclass(frozen=True)
class Config:
    results: str = str(ROOT / "results")  # folder of the committed results
    docs: str = str(ROOT / "docs")  # folder for the pictures


# ---- a tree --------------------------------------------------------------------------------------


def tree_picture(tree):
    """A tree (report/trees.py) -> SVG text: the question, then each answer with its verdict, reward
    and advantage, and each guiding phrase above the answers that follow it."""
    title = text_line(0, 0, COLOURS[INK], f"{tree['question']}    gold {tree['gold']}")
    lines, joints = [title], []
    grow(tree["answers"], 1, 0, lines, joints)
    size = f'viewBox="0 0 760 {HEIGHT * len(lines) + 24}" width="760"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="ui-monospace, monospace" '
        f'font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(joints)}'
        f"{''.join(lines)}</svg>\n"
    )


def grow(answers, depth, above, lines, joints):
    """Appends sibling answers, which share their phrase, and all that continues them to the lines
    of the picture, and the branches to them from line `above` to joints."""
    # The phrase once, above the siblings that follow it.
    for phrase in (node["phrase"] for node in answers[:1] if "phrase" in node):
        lines.append(text_line(len(lines), depth, "#666666", phrase, ' font-style="italic"'))
    for node in answers:
        sign, colour = SIGNS[node["right"]]
        text = text_of(node)
        for tag, short in TAGS.items():
            text = text.replace(tag, short)
        text = f"{sign} R={node['reward']:.0f} A={node['advantage']:+.2f}  {text}"
        joints.append(branch(above, len(lines), depth))
        lines.append(text_line(len(lines), depth, colour, text))
        grow(node["answers"], depth + 1, len(lines) - 1, lines, joints)


def text_line(number, depth, colour, text, style=""):
    """One line of the picture."""
    x, y = 14 + 34 * depth, 24 + HEIGHT * number
    text = html.escape(text)
    return f'<text x="{x}" y="{y}" fill="{colour}"{style} xml:space="preserve">{text}</text>'


def branch(above, number, depth):
    """The branch from an answer or the question on line `above` to the answer on line `number`."""
    path = f"M {34 * depth - 14} {28 + HEIGHT * above} V {20 + HEIGHT * number} h 24"
    stroke = f'stroke="{COLOURS[curves.GRID]}" stroke-width="1.5"'
    return f'<path d="{path}" fill="none" {stroke}/>'


# ---- charts --------------------------------------------------------------------------------------


def runs_picture(results, path):
    """Two runs from one base: accuracy on held-out questions."""
    runs = []
    for name in RUNS:
        metrics = list(lines_of(results / name / "metrics.jsonl", ("step", "generated")))
        result = json.loads((results / name / "result.json").read_text())
        runs.append((name.split("-")[1].upper(), curves.with_ends(metrics, result)))
    chart = curves.Chart(
        "",
        "held out, greedy: share right",
        {},
        {"heldout{k}": ("Acc@t{k}", 0)},
        share=True,
    )
    curves.alone(curves.draw(chart, runs[::-1], (6.4, 3.6)), path)


def looks_picture(results, path):
    """Accuracy at temperature 1 against the number of answers in a row, with 95 % intervals over
    bases (tools/tables.py), of the arms in LOOKS, the bases before training and their best
    constant. Dotted: what perfect checks would give, with and without a memory of the candidates
    that were tried."""
    import matplotlib

    lines = tables.with_bases(compare.read_lines(results / "compare-solve.jsonl"))
    arms, turns = tables.arms_of(lines), tables.turns_in(lines)
    controls = list(lines_of(results / "controls-solve.jsonl", ("right",)))
    looks = range(1, turns + 1)
    with matplotlib.rc_context(curves.STYLE):
        figure, axes = curves.new_figure((6.4, 3.6))
        for mark, (arm, name) in enumerate(LOOKS.items()):
            if arm == "one":
                groups = [[[line["right"][arm][k - 1]] for line in controls] for k in looks]
            else:
                groups = [tables.by_base(arms[arm], tables.value_of("T=1", f"t{k}")) for k in looks]
            means, halves = zip(*map(tables.interval, groups))
            halves = [half or 0 for half in halves]
            places = [k + 0.03 * (mark - 2) for k in looks]  # side by side, so that bars are seen
            axes.errorbar(
                places, means, halves, fmt="o-", color=LINES[mark], ms=4, capsize=3, label=name
            )
        for memory in (True, False):
            label = "perfect checks" if memory else None
            bound = tables.bound(Solve().candidates, turns, memory)
            axes.plot(looks, bound, color=INK, lw=1.2, ls=":", label=label)
        axes.set_xticks(looks, [f"answer {k}" for k in looks])
        axes.set_ylabel("share right, T=1")
        axes.set_ylim(0.4, 1)
        figure.legend(loc="outside lower left", ncols=3)
    curves.alone(figure, path)


def main():
    """Draws all of them, and prints how large they are."""
    config = parse_flags(Config, __doc__)
    results, docs = Path(config.results), Path(config.docs)
    if not curves.available():
        raise BadInput("the pictures are drawn with matplotlib: pip install matplotlib")
    trees = list(read_trees(results / RUNS[1] / "rollouts.jsonl"))
    # Where answers are all right, or all wrong, layer 1 has no advantages to show.
    mixed = [tree for tree in trees if len({node["right"] for node in tree["answers"]}) == 2]
    if not mixed:
        raise BadInput(
            f"--results {results}: {RUNS[1]}/rollouts.jsonl has no tree with right and wrong "
            "answers; the repository has one"
        )
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "tree.svg").write_text(tree_picture(mixed[0]), encoding="utf-8")
    runs_picture(results, docs / "runs.svg")
    looks_picture(results, docs / "looks.svg")
    for name in ("looks.svg", "runs.svg", "tree.svg"):
        print(f"{docs / name}: {(docs / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    guarded(main)
