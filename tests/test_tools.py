"""tools/: statistics and floors against cases computed by hand, and a tiny run of each tool."""

import re
import sys

import pytest
import torch
from conftest import ROOT, script

from runtime.flags import BadInput
from tools import (
    bench_kernels,
    bench_sampler,
    bench_training,
    bench_verifier,
    machine,
)

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
            cells = r"([0-9.]+ +){7}[0-9,]+ +[0-9.]+% +[0-9.]+%"
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
