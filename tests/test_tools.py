"""tools/: statistics and floors against cases computed by hand, and a tiny run of each tool."""

import json
import math
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
from tools import (
    bench_kernels,
    bench_sampler,
    bench_training,
    bench_verifier,
    compare,
    machine,
)

# ---- compare -------------------------------------------------------------------------------------


def line(arm, seed, last, t1=0.6, turns=2):
    """A line of the result file; `last`: accuracy of every answer but the first."""
    result = {f"t{k}": (last if k > 1 else t1, 0.01) for k in range(1, turns + 1)}
    result |= dict(delta=(last - t1, 0.01), tokens=50.0)
    for k in range(2, turns + 1):
        result |= {f"fix{k}": (0.2, 0.01), f"broke{k}": (0.1, 0.01)}
    results = dict.fromkeys(("greedy", "temperature 1"), result)
    return dict(
        arm=arm,
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
        extra=dict(fresh=(0.6, 0.01), majority=(0.61, 0.01), tokens=75.0),
    )


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


def test_the_interval_is_students():
    """Catches 1.96 for 5 seeds, or a std for a standard error: differences 1..5 have mean 3, std
    1.581, t(4) = 2.776."""
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))


def test_differences_are_paired_by_seed():
    """Catches runs paired by position: seeds written in another order must give the same interval,
    here of width 0."""
    lines = [line("grpo", s, 0.6 + s / 100) for s in (0, 1, 2)]
    lines += [line("mgrpo", s, 0.7 + s / 100) for s in (2, 0, 1)]
    assert "| greedy Acc@t2 | greedy Acc@t2 | +10.0 [+10.0, +10.0] |" in compare.paired_table(lines)
    text = compare.main_table(lines, "T=1")
    assert "| grpo (3 seeds) | 60.0 ± 0.0 | 61.0 ± 0.6 |" in text
    assert len({row.count("|") for row in text.splitlines()}) == 1


def test_tables_have_the_turns_of_the_longest_runs():
    """Catches a third answer that is left out, and a Δ(t1,t2) that stands under Δ(t1,t3): GRPO is
    asked twice, MGRPO of three layers three times."""
    lines = [line("grpo", s, 0.7) for s in (0, 1)] + [
        line("mgrpo", s, 0.8, turns=3) for s in (0, 1)
    ]
    table = compare.main_table(lines, "greedy").splitlines()
    assert table[0] == (
        "| greedy | Acc@t1 | Acc@t2 | Acc@t3 | Δ(t1,t3) "
        "| Δ i→c t2 | Δ c→i t2 | Δ i→c t3 | Δ c→i t3 |"
    )
    zero = "± 0.0 |"
    assert (
        table[-2] == f"| grpo (2 seeds) | 60.0 {zero} 70.0 {zero} | | 20.0 {zero} 10.0 {zero} | |"
    )
    assert table[-1].startswith(f"| mgrpo (2 seeds) | 60.0 {zero} 80.0 {zero} 80.0 {zero} 20.0")
    assert "| greedy Acc@t3 | greedy Acc@t2 | +10.0 " in compare.paired_table(lines)
    assert "mgrpo: 1.00 M generated tokens" in compare.footnotes(lines)
    assert "50 tokens for 3 turns" in compare.footnotes(lines)


def test_committed_results_can_be_printed(tmp_path, monkeypatch, capsys):
    """Catches committed results in the keys of older code: docs/results.md quotes this table."""
    monkeypatch.chdir(ROOT)
    printed = run_compare(monkeypatch, capsys, "--seeds", "0")
    assert "| mgrpo (5 seeds, other code) | 60.0 ± 0.5 | 88.8 ± 0.3 | 28.8 ± 0.5 |" in printed
    assert "| T=1 Δ c→i | T=1 Δ c→i | -12.2 [-13.3, -11.2] |" in printed


def test_results_of_an_unknown_form_are_one_sentence(tmp_path, monkeypatch, capsys):
    """Catches a traceback for a file whose lines have the keys of older code."""
    monkeypatch.chdir(tmp_path)
    old = json.loads(json.dumps(line("grpo", 0, 0.7)).replace("fix2", "i2c"))
    write_lines("t", [old])
    with pytest.raises(BadInput, match=r"compare-t\.jsonl is damaged"):
        run_compare(monkeypatch, capsys, "--name", "t", "--seeds", "0")


def test_runs_that_are_there_are_not_run_again():
    """Catches a comparison that repeats, or mixes runs made with other flags."""
    config = compare.Config(seeds=2, flags="--dtype float32")
    now = {
        arm: dict(flags=config.flags, version=compare.version(config, arm))
        for arm in ("grpo", "mgrpo")
    }
    lines = [
        line("grpo", 0, 0.6) | now["grpo"],
        line("mgrpo", 1, 0.6) | now["mgrpo"] | dict(flags="--task chain"),
        line("grpo", 1, 0.6) | now["grpo"] | dict(version="old"),
    ]
    assert compare.missing_runs(config, lines) == [("mgrpo", 0), ("grpo", 1), ("mgrpo", 1)]


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
    assert files <= set(compare.all_code())


def test_the_version_is_of_the_code_and_the_arms_flags(tmp_path, monkeypatch):
    """Catches runs of other code taken for today's: a change in any file gives another version,
    comments and docstrings aside, and so does an arm's flag."""
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
    monkeypatch.setitem(compare.ARMS, "keep", "--failed keep --clip 0.2,0.28")
    assert version() != before


def test_runs_of_other_code_are_printed_with_a_remark(tmp_path, monkeypatch, capsys):
    """Catches tables of other code printed as today's, two versions in one row, and old runs that
    hide new ones: grpo has old runs and a new one, keep two kinds of old ones, mgrpo old ones of
    another base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "version", lambda config, arm: f"now of {arm}")
    lines = [
        line("grpo", 0, 0.5),
        line("grpo", 0, 0.7) | dict(version="now of grpo"),
        line("grpo", 1, 0.5),
        line("keep", 0, 0.5) | dict(version="older"),
        line("keep", 0, 0.8),
        *(line("mgrpo", seed, 0.9) | dict(base="out/base-2.pt") for seed in (0, 1)),
    ]
    write_lines("t", lines)
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--seeds", "0")
    for row in (
        "| grpo (1 seeds) | 60.0 | 70.0 |",
        "| keep (1 seeds, other code) | 60.0 | 80.0 |",
        "| mgrpo (2 seeds, other code) | 60.0 ± 0.0 | 90.0 ± 0.0 |",
        "| base of grpo, keep |",
        "| base of mgrpo |",
    ):
        assert printed.count(row) == 2, row
    stale = "3 of these 4 runs (keep, mgrpo) were made by other code, "
    assert printed.splitlines()[-1].startswith(stale)
    missing = compare.missing_runs(compare.Config(seeds=2), lines)
    assert missing == [("mgrpo", 0), ("grpo", 1), ("mgrpo", 1)]
    write_lines("t", [one | dict(version=f"now of {one['arm']}") for one in lines[-2:]])
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--seeds", "0")
    assert "other code" not in printed


def test_half_a_line_costs_no_more_than_itself(tmp_path, monkeypatch, capsys):
    """Catches a traceback at every later call, after a run was killed while it wrote its line; and
    a next line that is appended to the half one, and lost."""
    monkeypatch.chdir(tmp_path)
    path = write_lines("t", [line("grpo", 0, 0.6)])
    with path.open("a") as file:
        file.write('{"arm": "gr\n{}\n' + json.dumps(line("mgrpo", 0, 0.8))[:99])
    monkeypatch.setattr(compare, "run_once", lambda config, arm, seed: line(arm, seed, 0.9))
    compare.run_and_keep(compare.Config(), path, "mgrpo", 1)
    compare.run_and_keep(compare.Config(), path, "mgrpo", 2)
    found = [(one["arm"], one["seed"]) for one in compare.read_lines(path)]
    assert found == [("grpo", 0), ("mgrpo", 1), ("mgrpo", 2)]
    assert path.read_text().endswith("}\n")
    said = capsys.readouterr()
    assert said.err == "results/compare-t.jsonl: 3 damaged lines are passed over\n"
    assert "mgrpo 1: greedy Acc@t1 60.0, greedy Acc@t2 90.0 (9 s)" in said.out
    printed = run_compare(monkeypatch, capsys, "--name", "t", "--seeds", "0")
    assert "| mgrpo (2 seeds" in printed
    new = tmp_path / "new.jsonl"
    compare.append(new, dict(a=1))
    assert new.read_text() == '{"a": 1}\n'


def test_votes_count_by_value_and_ties_are_shared(monkeypatch):
    """Catches a majority by spelling, in which 0.5 and 1/2 lose to two equal wrong answers or to
    nobody, and one that differs from eval.py's."""
    # right; wrong; a tie of three
    said = [r"0.5", r"\frac{1}{2}", "3", "4", "4", "7", "1", "2", "3"]
    layer = SimpleNamespace(
        correct=torch.tensor([True, True, False, False, False, True, True, False, False]),
        texts=[f"<answer>{text}</answer>" for text in said],
        lengths=torch.full((9,), 5),
    )
    monkeypatch.setattr(compare, "load_checkpoint", lambda *_: (None, None))
    monkeypatch.setattr(compare, "Sampler", lambda policy: None)
    monkeypatch.setattr(compare, "in_parallel", lambda sampler: sampler)
    monkeypatch.setattr(compare, "rollout", lambda *_: [layer])
    threads = torch.get_num_threads()
    config = compare.Config(flags="--device cpu --dtype float32 --eval-questions 3")
    found = compare.more_answers(config, "x", 9)
    torch.set_num_threads(threads)
    assert found["majority"][0] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert found["fresh"][0] == pytest.approx(1 / 3) and found["tokens"] == 15


@pytest.mark.parametrize("sizes, nodes", [("5,4", 25), ("4,3", 16), ("3,2,2", 21)])
def test_grpo_gets_as_many_answers_as_the_tree_has_nodes(sizes, nodes):
    """Catches a baseline with fewer samples per question, or of another compute type."""
    config = compare.Config(flags=f"--group-sizes {sizes} --dtype float32")
    words = compare.words_for(config, "grpo", 3)
    settings = compare.parse_flags(train.Config, "", argv=words)
    assert settings.group_sizes == (nodes,)
    assert (settings.seed, settings.hardware.dtype) == (3, "float32")


def test_every_arm_can_run():
    """Catches an arm with a flag that train.py does not take any more; layer 2 alone is what
    `layer2only` trains."""
    config = compare.Config(arms=tuple(compare.ARMS), flags="--device cpu --dtype float32")
    compare.check_arms(config)
    settings = {arm: compare.parsed(compare.arm_words(config, arm)) for arm in compare.ARMS}
    assert len(set(settings.values())) == len(compare.ARMS)
    assert settings["layer2only"].layer_weights == (0, 1)
    assert {s.tokens for s in settings.values()} == {train.Config().tokens}


@pytest.mark.parametrize(
    "words, says",
    [
        (["--arms", "grpo,nothing"], "there is no arm 'nothing'"),
        (["--flags", "--attempts 3"], "the first number of --group-sizes"),
        (["--flags", "--seed 3"], "--seed is not for this script: compare gives it to each run"),
        (["--flags", "--init x"], "built-in tasks"),
        (["--flags", "'"], "quotation marks come in pairs"),
        (["--flags", "--layer-weights 1,1"], "arm grpo: --layer-weights has 2 numbers"),
        (["--seeds", "21"], "--seeds 21: must be a number from 0 to 20"),
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
    """Catches a comparison whose runs do not share a base or a budget: three arms, one seed, on the
    smoke preset; and one that runs again what is there."""
    flags = "--preset smoke --tokens 6000 --base-tokens 60000 --eval-questions 16 --dtype float32"
    arms = ("--arms", "grpo,mgrpo,layer2only")
    words = ("tools.compare", "--name", "t", "--seeds", "1", *arms, "--flags", flags)
    printed = script(tmp_path, *words)
    path = tmp_path / "results/compare-t.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert {entry["arm"] for entry in lines} == {"grpo", "mgrpo", "layer2only"}
    assert len({entry["base"] for entry in lines}) == 1
    for entry in lines:
        assert 6000 <= entry["generated"] < 12000 and 0 <= entry["extra"]["majority"][0] <= 1
        assert f"| {entry['arm']} (1 seeds) |" in printed
    assert "tokens for two turns" in printed and "other code" not in printed
    again = script(tmp_path, *words)
    assert len(path.read_text().splitlines()) == 3
    assert again.splitlines()[-1] == printed.splitlines()[-1]


# ---- benches -------------------------------------------------------------------------------------

SIZES = ("--prompt-tokens", "5", "--new-tokens", "4", "--rounds", "1", "--device", "cpu")
SAMPLER = ("tools.bench_sampler", "--prompts", "2", "--group-size", "4", *SIZES)
TRAINING = ("tools.bench_training", "--prompts", "2", "--group-sizes", "4,2", *SIZES)


def training_bench(group_sizes, prompts, prompt_tokens, new_tokens, **options):
    load = machine.Load(prompts, prompt_tokens, new_tokens)
    config = bench_training.Config(group_sizes, load=load)
    return bench_training.Bench(config, torch.float32, "cpu", **options)


@pytest.mark.slow
def test_bench_sampler_prints_the_ladder():
    """Catches a bench that only works on its author's machine. No times are asserted."""
    printed = script(ROOT, *SAMPLER)
    lines = [*list(bench_sampler.LADDER)[:5], "ours"]
    for name in lines:
        for dtype in ("float32", "bfloat16"):
            cells = r"[0-9,]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+%"
            assert re.search(rf"{re.escape(name)} +{dtype} +{cells}", printed), name
    assert printed.count("compiled, not run: needs CUDA") == 4


@pytest.mark.slow
@pytest.mark.extra
def test_bench_sampler_measures_transformers():
    """Catches a peer that is silently left out although it is installed, or that does not do the
    same work."""
    pytest.importorskip("transformers", reason="needs transformers (requirements-extra.txt)")
    printed = script(ROOT, *SAMPLER, "--ladder", "none")
    assert re.search(r"ours \(\w+\) is [0-9.]+ times transformers 5", printed)
    assert "The ladder" not in printed


@pytest.mark.slow
def test_bench_training_prints_its_tables():
    """Catches a table of training that only works on its author's machine; and a tree that is not
    compared with rows. TRL has a table where it is installed."""
    printed = script(ROOT, *TRAINING)
    for kind in bench_training.KINDS:
        for dtype in ("float32", "bfloat16"):
            cells = r"([0-9.]+ +){8}[0-9,]+ +[0-9.]+% +[0-9.]+%"
            assert re.search(rf"^{kind}, {dtype} +{cells}$", printed, re.M), kind
    for name in ("g_1", "g_2", "tokens"):
        assert re.search(rf"^  {name} .* exponent -?[0-9.]+$", printed, re.M), name
    trl = re.findall(r"^TRL [0-9.]+ +(?:float32|bfloat16) +[0-9.]+$", printed, re.M)
    assert (len(trl) == 2 and "of TRL's step time" in printed) or "trl is not installed" in printed


def test_bench_verifier_prints_every_kind(monkeypatch, capsys):
    """Catches a kind of answers that raises, or that is left out."""
    monkeypatch.setattr(sys, "argv", ["bench_verifier", "--rounds", "1"])
    bench_verifier.main()
    printed = capsys.readouterr().out
    for kind in bench_verifier.GOLDS:
        assert re.search(rf"^{kind} +[0-9,]+ +[0-9,]+ +[0-9.]+$", printed, re.M), kind


def test_every_way_to_cut_rows_learns_the_same():
    """Catches a bench that compares unequal work: tree, padded and sorted rows of three layers have
    the same loss, and hold every row once."""
    bench = training_bench((3, 2, 2), 2, 5, 6)
    layers = bench.rollout(bench.clock())
    branches = bench_training.branches_of(layers)
    losses = {}
    for kind in bench_training.KINDS:
        batches = bench_training.microbatches(branches, kind, 60)
        rows = [(branch.layer.number, branch.row) for batch in batches for branch in batch]
        assert sorted(rows) == [(branch.layer.number, branch.row) for branch in branches]
        assert len(batches) > 1
        losses[kind] = sum(bench.loss(batch, kind).item() for batch in batches)
    assert losses["tree"] == pytest.approx(losses["padded rows"], abs=1e-5)
    assert losses["tree"] == pytest.approx(losses["sorted rows"], abs=1e-5)
    assert abs(losses["tree"]) > 1e-3


def test_the_floor_of_training_by_hand():
    """Catches a token of the trunk counted twice, or a pair of tokens left out: one question of 3,
    two answers of 2 tokens, both corrected once (by 2 tokens, of which the last needs no vector)."""
    bench = training_bench((2, 1), 1, 3, 2, ragged=False)
    layers, m = bench.rollout(bench.clock()), bench.model.config
    answer = 2 + len(bench_training.PHRASE)  # whole, with a phrase
    tokens = 3 + 2 * (answer + 1)
    pairs = 3 * 4 // 2 + 2 * sum(3 + i + 1 for i in range(answer)) + 2 * (3 + answer + 1)
    flops = 6 * sum(p.numel() for p in bench.model.parameters()) * tokens
    flops += 12 * m.heads * m.head_size * m.depth * pairs
    assert bench_training.train_work(m, layers) == (flops, tokens)


def test_the_floor_of_decoding_by_hand():
    """Catches a prefix counted once a row, keys counted once a query head, and a token that does
    not look at itself: two prompts of 5, two rows each, on a model of 1 block, D = 4, N = 2, K = 1,
    C = 2, hidden 3, V = 7, in bf16."""
    shape = machine.ModelConfig(7, 4, 1, 2, 1, 2, 3)
    parameters = 4 * 4 * 2 + 4 * 4 + 3 * 4 * 3 + 7 * 4
    volume, flops = machine.decode_work(shape, torch.bfloat16, 5, 2, [3, 1, 2, 2])
    own = 6 + 1 + 3 + 3
    assert volume == 2 * parameters * 3 + 8 * (own + 5 * 3 + 5 * 2)
    assert flops == 2 * parameters * 8 + 4 * 2 * 2 * (own + 5 * 8)


def test_variants_take_turns(monkeypatch):
    """Catches a variant timed while it warms up, or one that is timed in a block of its own, when
    the machine may be slower."""
    calls = []
    monkeypatch.setattr(machine, "timed", lambda run, device: run() or calls.append("timed"))
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = machine.in_turns(runs, 2, "cpu")
    assert calls == ["a", "a", "timed", "b", "b", "timed"] * 2
    assert {name: len(found) for name, found in seconds.items()} == dict(a=2, b=2)


@pytest.mark.parametrize(
    "tool, words, says",
    [
        (bench_sampler, ["--rows", "9"], "--prompts and --group-size make the rows"),
        (bench_sampler, ["--threads", "99999999"], "--threads 99999999: choose 1 to"),
        (bench_sampler, ["--rounds", "0"], "--rounds 0: must be a number of at least 1"),
        (bench_sampler, ["--ladder", "half"], "choose one of all, last, none"),
        (bench_training, ["--corrections", "4"], "the second number of --group-sizes"),
        (bench_training, ["--group-sizes", "4,0"], "each must be a number of at least 1"),
        (bench_kernels, ["--group", "8"], "--group-size 8"),
    ],
)
def test_benches_refuse_before_they_measure(tool, words, says, monkeypatch):
    """Catches old flags that are dropped in silence, and sizes that end in a traceback."""
    monkeypatch.setattr(sys, "argv", [tool.__name__, *words])
    with pytest.raises(BadInput, match=re.escape(says)):
        tool.main()
