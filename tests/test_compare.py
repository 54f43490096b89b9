"""tools/compare.py, tables.py and dial.py: intervals that cover, tables by hand, tiny runs."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script

import train
from runtime.flags import BadInput
from tasks.catalog import TaskConfig, make_task
from tools import compare, controls, dial, tables

# ---- statistics ----------------------------------------------------------------------------------


def test_the_interval_is_students():
    """Catches 1.96 for 5 bases, a std for a standard error, and seeds taken for bases: the bases'
    means 1..5 have mean 3, std 1.581, t(4) = 2.776. One base: its seeds."""
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert tables.interval([[0.5, 1.5], [2.0], [3.0, 3.0], [4.0], [5.0]]) == pytest.approx(
        (3, half)
    )
    assert tables.interval([[1.0, 2.0, 3.0, 4.0, 5.0]]) == pytest.approx((3, half))
    assert tables.interval([[0.7]]) == (0.7, None)
    assert tables.cell([[0.7, 0.9], [0.5]]) == "80.0 / 50.0"


def experiment(generator, spread, shift=0.0, bases=5, seeds=2, questions=1024):
    """Paired differences of two arms as a comparison finds them: [[of each seed] of each base].

    Bases differ by `spread`, seeds by half of that, and every pair of runs asks its own questions,
    each answered right or wrong by both arms at random, alike hard for both. The truth is `shift`.
    """
    found = []
    for _ in range(bases):
        base = shift + spread * torch.randn((), generator=generator)
        row = []
        for _ in range(seeds):
            gain = base + spread / 2 * torch.randn((), generator=generator)
            hard = torch.rand(questions, generator=generator)
            ours = torch.rand(questions, generator=generator) < (0.5 * hard + 0.25 + gain).clamp(
                0, 1
            )
            theirs = torch.rand(questions, generator=generator) < 0.5 * hard + 0.25
            row.append((ours.float().mean() - theirs.float().mean()).item())
        found.append(row)
    return found


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_placebo(spread):
    """Catches intervals that find what is not there: of 200 comparisons of equal arms, 95 % of the
    intervals must hold 0, whether bases differ or only questions do. (200 draws at .95 lie in
    .89 .. .99 with a probability above .999.)"""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        mean, half = tables.interval(experiment(generator, spread))
        held += abs(mean) <= half
    assert 0.89 <= held / 200 <= 0.99


def test_a_planted_shift_is_found():
    """Catches intervals too wide to be of use: 3 points between arms, bases that differ by 1."""
    generator, found = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        mean, half = tables.interval(experiment(generator, 0.01, shift=0.03))
        found += mean - half > 0
    assert found / 200 > 0.7


# ---- tables --------------------------------------------------------------------------------------


def line(arm, base_seed, last, seed=0, t1=0.6, turns=2):
    """A line of the result file; `last`: accuracy of every answer but the first."""
    result = {f"t{k}": (last if k > 1 else t1, 0.01) for k in range(1, turns + 1)}
    result |= dict(delta=(last - t1, 0.01), tokens=50.0, questions=1024)
    for k in range(2, turns + 1):
        result |= {f"fix{k}": (0.2, 0.01), f"broke{k}": (0.1, 0.01), f"fresh{k}": (None, None)}
        result |= {f"no_right{k}": (0.3, 0.01), f"no_wrong{k}": (0.9, 0.01)}
    results = dict.fromkeys(("greedy", "temperature 1"), result)
    return dict(
        arm=arm,
        base_seed=base_seed,
        seed=seed,
        flags="",
        version="v",
        base="out/base-1.pt",
        generated=1e6,
        steps=10,
        seconds=9.0,
        made_by=dict(threads=1),
        base_result=results,
        result=results,
        extra={
            "fresh": (0.6, 0.01),
            "majority": (0.61, 0.01),
            "pass": (0.8, 0.01),
            "tokens": 75.0,
        },
    )


def test_tables_are_means_over_bases():
    """Catches seeds counted as bases, differences of runs of other bases or seeds (lines stand in
    another order here: paired rightly, the interval has no width), and cells in other columns."""
    lines = [line("grpo", b, 0.6 + b / 100 + s / 500, s) for b in (0, 1, 2) for s in (0, 1)]
    lines += [line("mgrpo", b, 0.7 + b / 100 + s / 500, s) for b in (2, 0, 1) for s in (1, 0)]
    half = 4.303 / math.sqrt(3)
    wanted = f"| grpo | 60.0 ± 0.0 | 61.1 ± {half:.1f} | 61.0 ± 0.0 | 80.0 ± 0.0 | 3 x 2 x 1,024 |"
    table = tables.main_table(lines, "T=1")
    assert wanted in table.splitlines()
    assert len({text.count("|") for text in table.splitlines()}) == 1
    paired = tables.paired_table(lines, "T=1").splitlines()
    assert paired[0] == "| T=1, minus grpo | Acc@t1 | Acc@t2 |"
    assert paired[2:] == ["| mgrpo | +0.0 ± 0.0 | +10.0 ± 0.0 |"]
    assert tables.paired_table(lines[:6], "T=1") == ""
    other = line("rounds", 0, 0.9, t1=0.9) | dict(base="out/compare-first/checkpoint.pt")
    (base,) = tables.arms_of(tables.with_bases([*lines[:1], other]))["base"]
    assert base["result"] is lines[0]["base_result"]
    assert tables.with_bases(tables.with_bases(lines)) == tables.with_bases(lines)
    short = tables.short_table(lines).splitlines()
    assert short[0].startswith("| defaults | Acc@t1 | Acc@t2 | greedy t2 | t2 minus grpo | bases")
    assert short[2].endswith(f"| 61.1 ± {half:.1f} | 61.1 ± {half:.1f} | | 3 x 2 x 1,024 |")
    assert short[3].endswith("| +10.0 ± 0.0 | 3 x 2 x 1,024 |")
    looks = [tables.looks_table(lines, "T=1", field).splitlines()[2] for field in tables.LOOKS]
    assert looks[1:] == [
        "| grpo | 10.0 ± 0.0 |",
        "| grpo | 30.0 ± 0.0 |",
        "| grpo | 90.0 ± 0.0 |",
        "| grpo | |",
    ]
    assert tables.placebo(lines) == "placebo, 0 in truth: grpo +0.0 ± 0.0, mgrpo +0.0 ± 0.0"
    notes = tables.footnotes(lines)
    assert "mgrpo: 1.00 M generated tokens, 10 steps, 9 s a run; inference 50 tokens for 2" in notes


def test_the_bound_by_hand():
    """Catches a bound that is no bound: with one or two candidates, half of the questions have one,
    which the first try hits, and half have two, of which it hits one in two."""
    assert tables.bound(2, 3) == [0.75, 1.0, 1.0]
    assert tables.bound(5, 4) == pytest.approx([0.4567, 0.7133, 0.87, 0.96], abs=1e-4)


def test_the_bound_without_memory_is_that_of_simulated_tries():
    """Catches a formula for other tries than these: never the last candidate again, else any."""
    rng, hits = random.Random(0), [0] * 4
    for _ in range(20_000):
        c, last, hit = rng.randint(1, 5), None, False
        for k in range(4):
            if not hit:
                last = rng.choice([x for x in range(c) if x != last])
                hit = last == 0
            hits[k] += hit
    simulated = [count / 20_000 for count in hits]
    assert tables.bound(5, 4, memory=False) == pytest.approx(simulated, abs=0.015)
    assert tables.bound(5, 4, memory=False)[:2] == pytest.approx(tables.bound(5, 2))


def run_compare(monkeypatch, capsys, *words):
    """-> what `python -m tools.compare` prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    compare.main()
    return capsys.readouterr().out


def write_lines(name, lines):
    path = Path(f"results/compare-{name}.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


# ---- runs ----------------------------------------------------------------------------------------


def test_results_of_an_unknown_form_are_one_sentence(tmp_path, monkeypatch, capsys):
    """Catches a traceback for a file whose lines have the keys of older code."""
    monkeypatch.chdir(tmp_path)
    old = json.loads(json.dumps(line("grpo", 0, 0.7)).replace("temperature 1", "warm"))
    write_lines("t", [old])
    with pytest.raises(BadInput, match=r"compare-t\.jsonl is damaged"):
        run_compare(monkeypatch, capsys, "--name", "t", "--bases", "0")


def test_runs_that_are_there_are_not_run_again():
    """Catches a comparison that repeats, or mixes runs made with other flags."""
    config = compare.Config(arms=("grpo", "mgrpo"), bases=2, flags="--dtype float32")
    now = {
        arm: dict(flags=config.flags, version=compare.version(config, arm))
        for arm in ("grpo", "mgrpo")
    }
    lines = [
        line("grpo", 0, 0.6) | now["grpo"],
        line("mgrpo", 1, 0.6, 20) | now["mgrpo"] | dict(flags="--task chain"),
        line("grpo", 1, 0.6, 20) | now["grpo"] | dict(version="old"),
    ]
    missing = [("mgrpo", 0, 0), ("grpo", 1, 20), ("mgrpo", 1, 20)]
    assert compare.missing_runs(config, lines) == missing


@pytest.mark.slow
def test_the_version_knows_every_file_that_a_run_loads():
    """Catches a file whose change goes unnoticed, held against what Python has loaded after
    train.py and compare: rooms, and files that a function imports."""
    program = (
        "import sys, train; from tools import compare; "
        "print(*{m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = {str(Path(f).relative_to(ROOT)) for f in loaded if Path(f).is_relative_to(ROOT)}
    assert {"train.py", "engine/packing.py", "verifier/__init__.py"} <= files
    assert files - {"tools/tables.py"} <= set(compare.all_code())


def test_the_version_is_of_the_code_and_the_arms_flags(tmp_path, monkeypatch):
    """Catches runs of other code taken for today's: a change in any file gives another version,
    comments and docstrings aside, and so does an arm's flag. And runs that count as old because an
    arm was added, or because a default changed that they do not use."""
    files = [*compare.all_code()]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    uncached = compare.all_code.__wrapped__
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "all_code", uncached)
    version = lambda: compare.version(compare.Config(flags="--dtype float32"), "keep")
    before = version()
    for name in ("tools/compare.py", "engine/packing.py", "eval.py", "verifier/__init__.py"):
        source = (tmp_path / name).read_text()
        (tmp_path / name).write_text(source + "\nCHANGED = 1\n")
        assert version() != before, name
        (tmp_path / name).write_text(source + "# a comment\n")
    assert version() == before
    for name, old, new in (
        ("tools/compare.py", "MAP = (", 'MAP = (("more", README_ARMS, 1, ""),'),
        ("train.py", "clip: tuple[float, ...] = (0.2,)", "clip: tuple[float, ...] = (0.3,)"),
    ):
        source = (tmp_path / name).read_text()
        assert source.count(old) == 1
        (tmp_path / name).write_text(source.replace(old, new))
        assert version() == before, name
    monkeypatch.setitem(compare.ARMS, "keep", "--method-args failed=keep --clip 0.2,0.28")
    assert version() != before


def test_runs_of_other_code_are_printed_with_a_remark(tmp_path, monkeypatch, capsys):
    """Catches tables of other code printed as today's, two versions in one row, and old runs that
    hide new ones: grpo has old runs and a new one, keep two kinds of old ones, mgrpo old ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "version", lambda config, arm: f"now of {arm}")
    lines = [
        line("grpo", 0, 0.5),
        line("grpo", 0, 0.7) | dict(version="now of grpo"),
        line("grpo", 1, 0.5),
        line("keep", 0, 0.5) | dict(version="older"),
        line("keep", 0, 0.8),
        *(line("mgrpo", b, 0.9, 20 * b) for b in (0, 1)),
    ]
    write_lines("t", lines)
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--bases", "0")
    for row in (
        "| grpo | 60.0 | 70.0 |",
        "| keep (other code) | 60.0 | 80.0 |",
        "| mgrpo (other code) | 60.0 / 60.0 | 90.0 / 90.0 |",
    ):
        assert printed.count(row) == 3, row
    stale = "3 of these 4 runs (keep, mgrpo) were made by other code, "
    assert printed.splitlines()[-1].startswith(stale)
    config = compare.Config(arms=("grpo", "mgrpo"), bases=2)
    missing = compare.missing_runs(config, lines)
    assert missing == [("mgrpo", 0, 0), ("grpo", 1, 20), ("mgrpo", 1, 20)]
    write_lines("t", [one | dict(version=f"now of {one['arm']}") for one in lines[-2:]])
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--bases", "0")
    assert "other code" not in printed


def test_half_a_line_costs_no_more_than_itself(tmp_path, monkeypatch, capsys):
    """Catches a traceback at every later call, after a run was killed while it wrote its line; and
    a next line that is appended to the half one, and lost."""
    monkeypatch.chdir(tmp_path)
    path = write_lines("t", [line("grpo", 0, 0.6)])
    with path.open("a") as file:
        file.write('{"arm": "gr\n{}\n' + json.dumps(line("mgrpo", 0, 0.8))[:99])
    monkeypatch.setattr(compare, "run_once", lambda config, arm, b, seed: line(arm, b, 0.9, seed))
    compare.run_and_keep(compare.Config(), path, "mgrpo", 1, 20)
    compare.run_and_keep(compare.Config(), path, "mgrpo", 2, 40)
    found = [(one["arm"], one["base_seed"]) for one in compare.read_lines(path)]
    assert found == [("grpo", 0), ("mgrpo", 1), ("mgrpo", 2)]
    assert path.read_text().endswith("}\n")
    said = capsys.readouterr()
    assert said.err == "results/compare-t.jsonl: 3 damaged lines are passed over\n"
    assert "mgrpo, base 1, seed 20: T=1 60.0 90.0 (9 s)" in said.out
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--bases", "0")
    assert "| mgrpo (other code) |" in printed
    new = tmp_path / "new.jsonl"
    compare.append(new, dict(a=1))
    assert new.read_text() == '{"a": 1}\n'


def test_votes_count_by_value_and_ties_are_shared(monkeypatch):
    """Catches a majority by spelling, in which 0.5 and 1/2 lose to two equal wrong answers or to
    nobody, one that differs from eval.py's, and a pass that is not of any answer."""
    # right; wrong; a tie of three
    said = [r"0.5", r"\frac{1}{2}", "3", "4", "4", "7", "1", "2", "3"]
    layer = SimpleNamespace(
        correct=torch.tensor([True, True, False, False, False, True, True, False, False]),
        answers=[(text,) for text in said],
        lengths=torch.full((9,), 5),
    )
    monkeypatch.setattr(compare, "load_checkpoint", lambda *_: (None, None))
    monkeypatch.setattr(compare, "Sampler", lambda policy: None)
    monkeypatch.setattr(compare, "rollout", lambda *_: [layer])
    threads = torch.get_num_threads()
    words = "--device cpu --dtype float32 --eval-questions 3 --turns 3"
    found = compare.more_answers(compare.Config(flags=words), "x", 9)
    torch.set_num_threads(threads)
    assert found["majority"][0] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert found["fresh"][0] == pytest.approx(1 / 3) and found["tokens"] == 15
    assert found["pass"][0] == 1


@pytest.mark.parametrize("sizes, nodes", [("5,4", 25), ("4,3", 16), ("3,2,2", 21)])
def test_grpo_gets_as_many_answers_as_the_tree_has_nodes(sizes, nodes):
    """Catches a baseline with fewer samples per question, or of another compute type."""
    config = compare.Config(flags=f"--group-sizes {sizes} --dtype float32")
    (words,) = compare.run_words(config, "grpo", 1, 20)
    settings = compare.parse_flags(train.Config, "", argv=words)
    assert settings.group_sizes == (nodes,)
    assert (settings.seed, settings.base.base_seed) == (20, 1)
    assert (settings.hardware.dtype, settings.turns) == ("float32", 4)


def test_every_arm_can_run():
    """Catches an arm with a flag that train.py does not take any more, two arms that are one, and
    an arm with more tokens than another; `layer2` trains layer 2 alone."""
    config = compare.Config(arms=tuple(compare.ARMS), flags="--device cpu --dtype float32")
    compare.check_arms(config)
    runs = {arm: compare.run_words(config, arm, 0, 0) for arm in compare.ARMS if arm != "dial"}
    settings = {arm: [compare.parsed(run, {}) for run in words] for arm, words in runs.items()}
    assert len(
        {str([one.__dict__ | {"name": ""} for one in of]) for of in settings.values()}
    ) == len(runs)
    assert settings["layer2"][0].layer_weights == (0, 1)
    assert {sum(one.tokens for one in of) for arm, of in settings.items() if arm != "longer"} == {
        train.Config().tokens
    }
    preset = compare.parsed(["--preset", "paper"])
    (paper,) = settings["paper"]
    for name in ("prompts", "group_sizes", "kl_coef", "puzzle", "base"):
        assert getattr(paper, name) == getattr(preset, name)
    first, second = settings["rounds"]
    assert second.base.start == f"out/{first.name}" and first.group_sizes == (16,)
    assert settings["disco"][0].group_sizes == (16,) == settings["unlikely"][0].group_sizes
    assert settings["unlikely-4,3"][0].epochs == 2 and settings["igrpo"][0].group_sizes == (4, 4)
    assert (second.group_sizes, second.layer_weights) == ((4, 3), (0, 1))


@pytest.mark.parametrize("name, arms, bases, words", compare.MAP)
def test_every_experiment_of_the_map_can_run(name, arms, bases, words):
    """Catches hours of runs that end at an experiment whose flags are refused."""
    compare.check_arms(compare.Config(name=name, arms=arms, bases=bases, flags=words))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--arms", "grpo,nothing"], "there is no arm 'nothing'"),
        (["--flags", "--attempts 3"], "the first number of --group-sizes"),
        (["--flags", "--seed 3"], "--seed is not for this script: compare gives it to each run"),
        (["--flags", "--init x"], "built-in tasks"),
        (["--flags", "'"], "quotation marks come in pairs"),
        (["--flags", "--layer-weights 1,1"], "arm grpo: --layer-weights has 2 numbers"),
        (["--bases", "21"], "--bases 21: must be a number from 0 to 20"),
        (
            ["--map", "moon"],
            "--map moon: there is no such experiment; choose from solve, switches, reviewer-doubting",
        ),
        (["--arms", "chains", "--flags", "--looks 2"], "asks for 4 answers in a row"),
        (["--jobs", "0"], "--jobs 0: must be a number of at least 1"),
        (["--name", "../x"], "no slashes"),
    ],
)
def test_compare_refuses_before_it_runs(words, says, tmp_path, monkeypatch, capsys):
    """Catches minutes spent on runs that cannot be, and a folder left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=re.escape(says)):
        run_compare(monkeypatch, capsys, *words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_compare_runs_its_arms_once(tmp_path):
    """Catches a comparison whose runs do not share a base, a budget or questions: four arms on the
    smoke preset from two bases; and one that runs again what is there."""
    flags = "--preset smoke --tokens 6000 --base-tokens 60000 --eval-questions 16 --dtype float32"
    arms = ("--arms", "dial,grpo,mgrpo,rounds")
    words = ("tools.compare", "--name", "t", "--bases", "2", *arms, "--flags", flags)
    printed = script(tmp_path, *words)
    path = tmp_path / "results/compare-t.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert sorted((entry["arm"], entry["base_seed"]) for entry in lines) == [
        (arm, base) for arm in ("dial", "grpo", "mgrpo", "rounds") for base in (0, 1)
    ]
    for base in (0, 1):
        of = {entry["arm"]: entry for entry in lines if entry["base_seed"] == base}
        assert of["grpo"]["base_result"] == of["mgrpo"]["base_result"]
        assert of["dial"]["base"] == of["grpo"]["base"] == of["mgrpo"]["base"]
        assert of["rounds"]["base"].endswith(f"-rounds-{base}-{20 * base}-first/checkpoint.pt")
    for entry in lines:
        # a step is never cut, and the arm `rounds` has two last steps
        assert entry["arm"] == "dial" or 6000 <= entry["generated"] < 30000
        assert f"| {entry['arm']} |" in printed
    assert "| base |" in printed and "other code" not in printed
    again = script(tmp_path, *words)
    assert len(path.read_text().splitlines()) == 8
    assert again.splitlines()[-1] == printed.splitlines()[-1]


# ---- the dial ------------------------------------------------------------------------------------


def test_the_dial_turns_one_token(gpt, monkeypatch):
    """Catches a shift that does nothing, acts on another token or at another time, and a fit that
    does not return the best constants."""
    sampler = dial.DialledSampler(gpt, token=7)
    plain = sampler.generate([[1, 2, 3]], 4, 6, 0.0)
    sampler.shift = 1e4
    turned = sampler.generate([[1, 2, 3]], 4, 6, 0.0)
    assert (turned.tokens == 7).all() and not (plain.tokens == 7).all()
    sampler.shift = -1e4
    assert not (sampler.generate([[1, 2, 3]], 64, 6, 1.0).tokens == 7).any()
    # Accuracies of the second and third answer that are best at a shift of 1 and T=0.7.
    figure = lambda k, t: (0.1 * k - abs(sampler.shift - 1) - abs(t - 0.7), 0.0)
    found = lambda *_, turns, temperature, name: {
        f"t{k}": figure(k, temperature) for k in (1, 2, 3)
    }
    monkeypatch.setattr(dial, "evaluate", found)
    task = SimpleNamespace(puzzle=None)
    monkeypatch.setattr(dial, "draw", lambda *_: None)
    assert dial.fit(sampler, task, 3, dial.TEMPERATURES) == (1.0, 0.7)
    assert dial.fit(sampler, task, 3, (0.0,)) == (1.0, 0.0)


def test_the_maps_table_has_a_line_for_each_experiment():
    """Catches gains over another arm than the head says, and an experiment without an arm that
    takes the cells of another one."""
    first = [line(arm, b, last) for arm, last in (("grpo", 0.6), ("dial", 0.7)) for b in (0, 1)]
    first += [line("chains", b, 0.8 + b / 100) for b in (0, 1)]
    second = [line("mgrpo", 0, 0.9), line("grpo", 0, 0.65)]
    table = tables.map_table({"one": first, "two": second}).splitlines()
    assert table[0].endswith(
        "| mgrpo - GRPO | mgrpo - dial | chains - GRPO | chains - dial | bases |"
    )
    assert table[2] == (
        "| one | 30.0 / 30.0 | 90.0 / 90.0 | 80.0 / 81.0 | | | +20.0 / +21.0 | +10.0 / +11.0 | 2 |"
    )
    assert table[3] == "| two | 30.0 | 90.0 | 65.0 | +25.0 | | | | 1 |"


# ---- constants by operation ----------------------------------------------------------------------


def test_controls_fit_every_operation_by_itself(monkeypatch):
    """Catches one constant given to all questions in `three`, a fit by the first answer, and
    questions that get the constants of another operation: answers are right here where the shift
    is that of the question's operation, at the right temperature."""
    task = make_task(TaskConfig())
    problems = task.held_out(60, 0)
    assert {*controls.last_operations(problems)} == {"*", "+", "-"}
    wanted = {"*": 2.0, "+": 0.5, "-": -0.25}

    def asked(sampler, task, problems, turns, temperature, seed, shift=0.0):
        right = torch.zeros(len(problems), turns)
        for operation, rows in controls.last_operations(problems).items():
            right[rows, 1:] = float(shift == wanted[operation] and temperature == 0.4)
            right[rows, 0] = float(shift == 3.0)
        return right, right

    monkeypatch.setattr(controls, "asked", asked)
    found = controls.fit(None, task, 3, 0)
    assert found["three"] == {operation: (shift, 0.4) for operation, shift in wanted.items()}
    (one,) = {*found["one"].values()}
    assert one[0] in wanted.values() and one[1] == 0.4
    right = controls.measured(None, task, problems, 3, 0, found["three"])
    assert right == [0.0, 1.0, 1.0]
    right = controls.measured(None, task, problems, 3, 0, found["one"])
    assert 0.1 < right[1] < 0.6


def test_rates_are_of_the_second_answer(monkeypatch):
    """Catches shares of all answers instead of the right, or the wrong, ones: of four answers to
    questions of one operation, the two right ones are changed once, the wrong ones always."""
    problem = SimpleNamespace(data=((1, 2), (("*", 2), ("+", 3)), 0))
    right = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]])
    changed = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1]])
    monkeypatch.setattr(controls, "asked", lambda *_: (right, changed))
    assert controls.rates(None, None, [problem] * 4, 0) == {"+": [0.5, 1.0]}


def test_gains_over_constants_are_of_the_same_base():
    """Catches a run minus the constants of another base (they differ here by what the runs differ,
    so that the interval has no width), gains of the second answer for those of the last, greedy
    ones for those at T=1, and means over rates that a base does not have."""
    runs = [line("mgrpo", b, 0.7 + b / 100) for b in (2, 0, 1)] + [line("chains", 3, 0.9)]
    for run in runs:
        run["result"] = run["result"] | {"greedy": run["result"]["greedy"] | {"t2": (0.9, 0.0)}}
    rates = {0: {"+": [0.5, None]}, 1: {"+": [0.1, 0.9]}, 2: {"+": [0.3, 0.8]}}
    lines = [
        dict(
            base_seed=b,
            questions=24,
            right=dict(one=[0.5, 0.6 + b / 100], three=[0.5, 0.8 + b / 100]),
            rates={"base": rates[b]} if b else {"base": rates[b], "mgrpo": rates[1]},
        )
        for b in (0, 1, 2)
    ]
    constants, gains, changes = tables.controls_tables(lines, runs).split("\n\n")
    half = 4.303 / math.sqrt(3)
    assert constants.splitlines()[2] == f"| one | 50.0 ± 0.0 | 61.0 ± {half:.1f} | 3 x 1 x 24 |"
    assert gains.splitlines()[0].startswith("| Acc@t2 | T=1, minus one | T=1, minus three | greedy")
    found = f"| +10.0 ± 0.0 | -10.0 ± 0.0 | +29.0 ± {half:.1f} | +9.0 ± {half:.1f} |"
    assert gains.splitlines()[2:] == ["| mgrpo " + found]
    assert changes.splitlines()[2:] == ["| base | 30 | 85 | 3 |", "| mgrpo | 10 | 90 | 1 |"]


@pytest.mark.slow
def test_controls_of_a_comparison(tmp_path):
    """Catches controls of other bases or questions than the runs', and a base measured twice: tiny
    runs of compare.py, in their folder."""
    flags = "--preset smoke --tokens 3000 --base-tokens 60000 --eval-questions 24 --dtype float32"
    words = ("--name", "t", "--bases", "1", "--arms", "dial,mgrpo", "--flags", flags)
    script(tmp_path, "tools.compare", *words)
    printed = script(tmp_path, "tools.controls", "--name", "t")
    (entry,) = map(json.loads, (tmp_path / "results/controls-t.jsonl").read_text().splitlines())
    runs = map(json.loads, (tmp_path / "results/compare-t.jsonl").read_text().splitlines())
    first = {
        run["arm"]: run["base_result"]["greedy"]["t1"][0] for run in runs if run["base_result"]
    }
    assert len(entry["right"]["three"]) == 2 and {*entry["rates"]} == {"base", "mgrpo"}
    assert "| three |" in printed and "| mgrpo |" in printed
    if all(temperature == 0 for _, temperature in entry["constants"]["one"].values()):
        assert entry["right"]["one"][0] == pytest.approx(first["mgrpo"])
    assert script(tmp_path, "tools.controls", "--name", "t", "--bases", "0") == printed
    path = tmp_path / "results/controls-t.jsonl"
    assert controls.todays(path, {0: entry["version"]}) == [entry]
    assert controls.todays(path, {0: "newer"}) == []  # of other code or another base: never shown
