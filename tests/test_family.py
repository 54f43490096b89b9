"""tools/family.py and tools/one_step.py: claims of GRPO's relatives beside what was measured."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import family, one_step
from tools.compare import read_lines
from tools.one_step import FIGURES, effect
from variants.table import METHODS

ROOT = Path(__file__).parent.parent


def test_every_relative_has_a_claim_on_a_task_where_it_ran():
    """Catches a method without a row in the table of claims, and a claim about an arm or a figure
    that no run has."""
    from tools.compare import MAP

    assert {method for method, *_ in family.CLAIMS} == {*METHODS} - {"grpo"}
    ran = {name: {a for n, arms, *_ in MAP if n == name for a in arms} for name in family.RUNS}
    for method, _, figure, where, claimed, expected in family.CLAIMS:
        assert {claimed, expected} <= {*"+-0"} and (
            where == family.STEP or {method, "grpo"} <= ran[where]
        ), method
        assert (figure in {*FIGURES, "rare over all right"}) == (where == family.STEP)


@pytest.mark.parametrize(
    "groups, expected, words",
    [
        ([[0.1], [0.11], [0.12]], "+", "confirmed"),
        ([[0.1], [0.11], [0.12]], "-", "refuted"),
        ([[0.01], [0.01], [0.01]], "+", "not resolved"),  # no spread, so no interval
        ([[0.1], [0.11], [0.12]], "0", "refuted"),
        ([[-0.004], [-0.005], [-0.006]], "0", "confirmed"),  # a difference, but of half a point
        ([[0.008], [0.01], [0.012]], "0", "not resolved"),
        ([[0.1], [-0.11], [0.02]], "+", "not resolved"),
        ([[0.1], [-0.11], [0.02]], "0", "not resolved"),
        ([[0.1], [0.11]], "+", "not resolved"),  # two bases have no interval of use
    ],
)
def test_a_verdict_needs_an_interval_without_0(groups, expected, words):
    """Catches verdicts from means alone."""
    assert family.verdict(groups, expected) == words


def test_differences_are_of_the_same_base_and_seed():
    """Catches runs that are compared with GRPO's from another base, and runs without a partner."""
    line = lambda arm, base, seed, x: (dict(arm=arm, base_seed=base, seed=seed), dict(figure=x))
    runs = [line("grpo", 0, 0, 1.0), line("grpo", 1, 20, 5.0), line("disco", 1, 20, 7.0)]
    runs += [line("disco", 0, 0, 1.5), line("disco", 2, 40, 9.0), line("raft", 0, 0, None)]
    assert family.differences(runs, "disco", "figure") == [[0.5], [2.0]]
    assert family.differences(runs, "raft", "figure") == []


def test_the_table_of_claims_by_hand(monkeypatch):
    """Catches a claim whose row shows another method's runs, figure, unit, or number of bases."""
    claims = (("disco", "hard ones count", "pass@1", family.CHAIN, "+", "0"),)
    monkeypatch.setattr(family, "CLAIMS", claims)
    line = lambda arm, base, x: (dict(arm=arm, base_seed=base, seed=base), {"pass@1": x})
    runs = [line("grpo", base, 0.5) for base in range(3)]
    runs += [line("disco", base, x) for base, x in enumerate((0.61, 0.6, 0.59))]
    table = family.claims_table({family.CHAIN: [*runs, line("raft", 0, 0.9)]})
    # t = 4.303, standard error 1 / sqrt(3)
    cells = "`disco` | hard ones count | pass@1; family-chain | + | 0 | +10.0 ± 2.5 | confirmed | 3"
    assert table.splitlines()[2:] == [f"| {cells} |"]


def test_the_figures_of_a_committed_run():
    """Catches a figure that a run of compare.py does not have, or not under that name."""
    lines = read_lines(ROOT / "results/compare-solve.jsonl")
    line = next(line for line in lines if line["arm"] == "mgrpo")
    looked = dict(hard=0.1, easy=0.2, worst=0.3, consistent=0.4, tokens=9.0)
    found = family.figures(line, looked | {"pass": [0.5, 0.6, 0.7]})
    assert {figure for _, _, figure, where, *_ in family.CLAIMS if where != family.STEP} <= {*found}
    assert {*family.MEANS} <= {*found} and found["pass@4"] == 0.6
    row = line["result"]["temperature 1"]
    assert (found["i→c"], found["Acc@t2"]) == (row["fix2"][0], row["t2"][0])


def test_the_table_of_means_by_hand():
    """Catches means over runs instead of bases, or over other bases than the other arms', a share
    that is not in percent, and a figure that a run does not have."""
    found = dict.fromkeys(family.MEANS, 0.5) | {"tokens": 31.5, "pass@1, hard questions": None}
    line = lambda base, seed: dict(arm="grpo", base_seed=base, seed=seed)
    runs = [(line(0, 0), found), (line(0, 1), found), (line(1, 2), found | {"Acc@t1": 0.6})]
    runs.append((line(2, 3), found | {"Acc@t1": 9.0}))  # from a base that the other has not
    runs += [(line(base, 0) | dict(arm="raft"), found) for base in (0, 1)]
    cells = "55.0 | 50.0 | 50.0 | 50.0 | 50.0 |  | 50.0 | 31.50 | 50.0 | 0.5000 | 0.5"
    assert family.means_table(runs).splitlines()[2] == f"| `grpo` | {cells} |"


def test_chances_by_hand():
    """Catches a pass@k that is not the chance of a right answer among k: with 1 of 4 samples right
    it is 1/4, 1/2 and 1 for 1, 2 and 4."""
    right = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    assert [family.chances(right, k) for k in (1, 2, 4)] == [1 / 8, 1 / 4, 1 / 2]


def test_the_effect_of_a_step_by_hand(monkeypatch):
    """Catches an effect with the signs turned, padding in sums, text of the method's own among the
    sampled rows, and advantages that are not compared with GRPO's of the same rows."""
    # Two groups of three: right, wrong, wrong; and all right.
    correct = torch.tensor([True, False, False, True, True, True])
    layer = SimpleNamespace(
        number=1,
        rewards=correct.float(),
        correct=correct,
        mask=torch.tensor([[True, True], [True, False]] * 3),
        given=torch.tensor([False] * 5 + [True]),
        questions=torch.tensor([0, 0, 0, 1, 1, 1]),
        parents=torch.tensor([0, 0, 0, 1, 1, 1]),
        advantages=torch.tensor([2.0, 1.0, -1.0, 0.0, 0.0, 3.0]),
        trained=torch.tensor([True, True, False, True, True, True]),
        lengths=torch.tensor([2, 1] * 3),
        observed={},
    )
    before = torch.tensor([[-1.0, -1], [-2, 9], [-2, -2], [-3, 9], [-1, -1], [-1, 9]])
    after = before + torch.tensor([[0.5, 0.5], [-1, 7], [0.1, 0.1], [-2, 7], [0.25, 0.25], [5, 5]])
    found = {"before_logp": before, "after_logp": after}
    fill = lambda model, layers, rows, names, config: layers[0].observed.update(
        {name: found[name] for name in names}
    )
    monkeypatch.setattr(one_step.observing, "observe", fill)
    plain = torch.tensor([1.0, -0.5, -0.5, 0, 0, 0])
    monkeypatch.setattr(
        one_step, "credit", lambda layers, method: setattr(layers[0], "advantages", plain)
    )
    kept = copy.copy(layer)
    assert effect(None, None, [layer], None) == pytest.approx(
        dict(
            right=(1 - 2 + 0.5) / 3,  # rows 0, 3 and 4; row 5 was not sampled
            fell=1 / 3,
            rare=-2,  # of -2, -3 and -2 the one below the median
            wrong=(-1 + 0.2) / 2,
            signal=2 / 5,
            turned=1 / 3,  # row 1; row 2 is not trained
            variance=(4 + 1 + 0) / 3,
        )
    )
    assert torch.equal(layer.advantages, kept.advantages)  # GRPO's went to a copy


@pytest.mark.slow
def test_every_method_makes_steps_side_by_side(tmp_path, monkeypatch, capsys):
    """Catches a method that the comparison of steps cannot run, and a table without its row."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    words = "--preset smoke --base-tokens 20000 --prompts 4 --dtype float32"
    monkeypatch.setattr("sys.argv", ["one_step", "--bases", "1", "--steps", "2", "--flags", words])
    threads = torch.get_num_threads()
    try:
        one_step.main()
    finally:
        torch.set_num_threads(threads)
    table = capsys.readouterr().out
    assert [name for name in METHODS if f"| `{name}` |" not in table] == []
    assert len(one_step.read_steps("solve")) == len(METHODS)
