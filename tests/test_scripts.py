"""compare.py and bench.py: their statistics against hand-computed cases, and a tiny run of each."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script

from tools import bench, bench_training, compare

# ---- compare -------------------------------------------------------------------------------------


def line(arm, seed, t2, t1=0.6):
    result = {
        k: dict(
            t1=(t1, 0.01),
            t2=(t2, 0.01),
            delta=(t2 - t1, 0.01),
            i2c=(0.2, 0.01),
            c2i=(0.1, 0.01),
            tokens=50.0,
        )
        for k in ("greedy", "temperature 1")
    }
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
        base_result=result,
        result=result,
        extra=dict(fresh=(0.6, 0.01), majority=(0.61, 0.01), tokens=75.0),
    )


def test_interval_is_students():
    """Catches 1.96 for 5 seeds, or a std for a standard error: differences 1..5 have mean 3, std
    1.581, t(4) = 2.776."""
    mean, half = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))


def test_differences_are_paired_by_seed():
    """Catches runs paired by position: seeds written in another order must give the same interval,
    here of width 0."""
    lines = [line("grpo", s, 0.6 + s / 100) for s in (0, 1, 2)] + [
        line("mgrpo", s, 0.7 + s / 100) for s in (2, 0, 1)
    ]
    assert "| greedy Acc@t2 | greedy Acc@t2 | +10.0 [+10.0, +10.0] |" in compare.paired_table(lines)
    text = compare.main_table(lines, "T=1")
    assert (
        "| grpo (3 seeds) | 60.0 ± 0.0 | 61.0 ± 0.6 |" in text
        and len({row.count("|") for row in text.splitlines()}) == 1
    )


def test_runs_that_are_there_are_not_run_again():
    """Catches a comparison that repeats, or mixes runs made with other flags."""
    c = compare.Config(seeds=2, flags="--dtype float32")
    now = {arm: dict(flags=c.flags, version=compare.version(c, arm)) for arm in ("grpo", "mgrpo")}
    lines = [
        line("grpo", 0, 0.6) | now["grpo"],
        line("mgrpo", 1, 0.6) | now["mgrpo"] | dict(flags="--task chain"),
        line("grpo", 1, 0.6) | now["grpo"] | dict(version="old"),
    ]
    assert compare.missing_runs(c, lines) == [("mgrpo", 0), ("grpo", 1), ("mgrpo", 1)]


def test_the_version_is_of_all_code_and_the_arms_flags(tmp_path, monkeypatch):
    """Catches runs of other code taken for today's: a change in any file that a run goes through
    gives another version (found here by what torch and Python have loaded after train.py), comments
    and docstrings aside; so does an arm's flag."""
    program = "import sys, os, compare; print(*{os.path.basename(m.__file__) for m in list(sys.modules.values()) if os.path.dirname(getattr(m, '__file__', '') or '') == os.getcwd()})"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert (
        {
            "compare.py",
            "train.py",
            "packing.py",
            "memory.py",
            "heldout.py",
            "tables.py",
            "parallel.py",
        }
        <= loaded
        <= set(compare.all_code())
    )
    for name in loaded:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "compare.py"))
    # which is cached otherwise
    monkeypatch.setattr(compare, "all_code", compare.all_code.__wrapped__)
    version = lambda: compare.version(compare.Config(flags="--dtype float32"), "keep")
    before = version()
    for name in ("compare.py", "heldout.py", "packing.py", "tables.py"):
        source = (tmp_path / name).read_text()
        (tmp_path / name).write_text(source + "\nCHANGED = 1\n")
        assert version() != before, name
        (tmp_path / name).write_text(source + "# a comment\n")
    assert version() == before
    monkeypatch.setitem(compare.ARMS, "keep", "--failed keep --clip-high 0.28")
    assert version() != before


def test_runs_of_other_code_are_printed_with_a_remark(tmp_path, monkeypatch, capsys):
    """Catches tables of other code printed as today's, two versions in one row, and old runs that
    hide new ones: grpo has old runs and a new one, keep two kinds of old ones, mgrpo old ones of
    another base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "version", lambda c, arm: f"now of {arm}")
    lines = [
        line("grpo", 0, 0.5),
        line("grpo", 0, 0.7) | dict(version="now of grpo"),
        line("grpo", 1, 0.5),
        line("keep", 0, 0.5) | dict(version="older"),
        line("keep", 0, 0.8),
        *(line("mgrpo", seed, 0.9) | dict(base="out/base-2.pt") for seed in (0, 1)),
    ]
    Path("results").mkdir()
    Path("results/compare-t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--name", "t", "--seeds", "0"])
    compare.main()
    printed = capsys.readouterr().out
    for row in (
        "| grpo (1 seeds) | 60.0 | 70.0 |",
        "| keep (1 seeds, other code) | 60.0 | 80.0 |",
        "| mgrpo (2 seeds, other code) | 60.0 ± 0.0 | 90.0 ± 0.0 |",
        "| base of grpo, keep |",
        "| base of mgrpo |",
    ):
        assert printed.count(row) == 2, row
    assert printed.splitlines()[-1].startswith(
        "3 of these 4 runs (keep, mgrpo) were made by other code, "
    )
    assert compare.missing_runs(compare.Config(seeds=2), lines) == [
        ("mgrpo", 0),
        ("grpo", 1),
        ("mgrpo", 1),
    ]
    today = [one | dict(version=f"now of {one['arm']}") for one in lines[-2:]]
    Path("results/compare-t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in today))
    compare.main()
    assert "other code" not in capsys.readouterr().out


def test_half_a_line_costs_no_more_than_itself(tmp_path, monkeypatch, capsys):
    """Catches a traceback at every later call, after a run was killed while it wrote its line; and
    a next line that is appended to the half one, and lost."""
    monkeypatch.chdir(tmp_path)
    path = Path("results/compare-t.jsonl")
    path.parent.mkdir()
    path.write_text(
        json.dumps(line("grpo", 0, 0.6))
        + "\n"
        + '{"arm": "gr\n{}\n'
        + json.dumps(line("mgrpo", 0, 0.8))[:99]
    )
    monkeypatch.setattr(compare, "run_once", lambda c, arm, seed: line(arm, seed, 0.9))
    compare.run_and_keep(compare.Config(), path, "mgrpo", 1)
    compare.run_and_keep(compare.Config(), path, "mgrpo", 2)
    assert [(one["arm"], one["seed"]) for one in compare.read_lines(path)] == [
        ("grpo", 0),
        ("mgrpo", 1),
        ("mgrpo", 2),
    ] and path.read_text().endswith("}\n")
    assert capsys.readouterr().err == "results/compare-t.jsonl: 3 damaged lines are passed over\n"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--name", "t", "--seeds", "0"])
    compare.main()
    assert "| mgrpo (2 seeds" in capsys.readouterr().out
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
    monkeypatch.setattr(compare, "load_policy", lambda *_: (None, None))
    monkeypatch.setattr(compare, "Sampler", lambda model: None)
    monkeypatch.setattr(compare, "expand", lambda *_: layer)
    threads = torch.get_num_threads()
    found = compare.more_answers(
        "x",
        dict(
            task="solve",
            candidates=3,
            operations=4,
            modulus=11,
            numbers=4,
            eval_questions=3,
            max_new_tokens=9,
            dtype="float32",
            device="cpu",
        ),
    )
    torch.set_num_threads(threads)
    assert (
        found["majority"][0] == pytest.approx((1 + 0 + 1 / 3) / 3)
        and found["fresh"][0] == pytest.approx(1 / 3)
        and found["tokens"] == 15
    )


def test_grpo_gets_as_many_rollouts_as_the_tree_has_nodes():
    """Catches a baseline with fewer samples per question: G + G x H of whatever preset runs, and
    one compute type for all runs."""
    words = compare.words_for(
        compare.Config(flags="--attempts 5 --corrections 4 --dtype float32"), "grpo", 3
    )
    config = compare.parse_flags(compare.train.Config, "", argv=words)
    assert (config.layers, config.attempts, config.seed, config.dtype) == (1, 25, 3, "float32")


def test_compare_end_to_end(tmp_path):
    """Catches a comparison whose runs do not share a base or a budget: two arms, one seed, on the
    smoke preset."""
    words = (
        "compare.py",
        "--name",
        "t",
        "--seeds",
        "1",
        "--flags",
        "--preset smoke --tokens 6000 --base-tokens 60000 --eval-questions 16 --dtype float32",
    )
    printed = script(tmp_path, *words)
    lines = [
        json.loads(text) for text in (tmp_path / "results/compare-t.jsonl").read_text().splitlines()
    ]
    assert {entry["arm"] for entry in lines} == {"grpo", "mgrpo"} and len(
        {entry["base"] for entry in lines}
    ) == 1
    assert all(
        6000 <= entry["generated"] < 12000 and 0 <= entry["extra"]["majority"][0] <= 1
        for entry in lines
    )
    assert (
        "| grpo (1 seeds) |" in printed
        and "| mgrpo (1 seeds) |" in printed
        and "tokens for two turns" in printed
    )
    again = script(tmp_path, *words)
    assert (
        len((tmp_path / "results/compare-t.jsonl").read_text().splitlines()) == 2
        and again.splitlines()[-1] == printed.splitlines()[-1]
    )


# ---- bench ---------------------------------------------------------------------------------------

SMALL = ("--rows", "8", "--group", "4", "--new", "4", "--prompt", "5", "--rounds", "1")


def test_bench_runs():
    """Catches a bench that only works on its author's machine. No times are asserted."""
    printed = script(ROOT, "bench.py", "sampler", *SMALL, "--device", "cpu")
    for name in (
        "recompute everything",
        "KV cache",
        r"\+ shared prefix",
        r"\+ ended rows leave",
        r"\+ a process on each core",
        "ours",
    ):
        for dtype in ("float32", "bfloat16"):
            assert re.search(
                rf"{name} +{dtype} +[0-9,]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9.]+%", printed
            ), name
    assert printed.count("compiled, not run: needs CUDA") == 4
    assert "The ladder" not in script(
        ROOT, "bench.py", "sampler", *SMALL, "--device", "cpu", "--ladder", "none"
    )


def test_bench_of_a_training_step_runs():
    """Catches a table of training that only works on its author's machine; and a tree that is not
    compared with rows."""
    printed = script(ROOT, "bench.py", "train", *SMALL, "--corrections", "2", "--device", "cpu")
    for kind in ("padded rows", "sorted rows", "tree"):
        for dtype in ("float32", "bfloat16"):
            assert re.search(
                rf"^{kind}, {dtype} +([0-9.]+ +){{8}}[0-9,]+ +[0-9.]+% +[0-9.]+%$", printed, re.M
            ), kind
    assert all(
        re.search(rf"^  {name} .* exponent -?[0-9.]+$", printed, re.M)
        for name in ("G", "H", "tokens")
    )


@pytest.mark.extra
def test_bench_against_trl_runs():
    """Catches a TRL whose steps are not timed, or that ends rows early and is compared with full
    ones."""
    pytest.importorskip("trl")
    printed = script(ROOT, "bench.py", "train", *SMALL, "--corrections", "2", "--device", "cpu")
    assert (
        len(re.findall(r"^TRL [0-9.]+ +(?:float32|bfloat16) +[0-9.]+$", printed, re.M)) == 2
        and "of TRL's step time" in printed
    )


def test_the_floor_of_training_by_hand():
    """Catches a token of the trunk counted twice, or a pair of tokens left out: one question of 3,
    two attempts of 2 tokens (of which the last needs no vector), one of them gone on from."""
    c = dataclasses.replace(bench.Config(), rows=2, group=2, corrections=1, prompt=3, new=2)
    one = bench_training.Bench(c, torch.float32, "cpu", ragged=False)
    layers, m = one.rollout(bench_training.Clock("cpu")), one.model.config
    attempt = 2 + len(bench_training.PHRASE)  # both are gone on from: whole, with a phrase
    tokens = 3 + 2 * (attempt + 1)
    pairs = 3 * 4 // 2 + 2 * sum(3 + i + 1 for i in range(attempt)) + 2 * (3 + attempt + 1)
    assert (
        bench_training.work(m, layers)
        == 6 * sum(p.numel() for p in one.model.parameters()) * tokens
        + 12 * m.heads * m.head_size * m.depth * pairs
    )


def test_the_floor_by_hand():
    """Catches a prefix counted once a row, keys counted once a query head, and a token that does
    not look at itself: two prompts of 5, two rows each, on a model of 1 layer, D = 4, N = 2, K = 1,
    C = 2, F = 3, V = 7, in bf16."""
    shape = bench.ModelConfig(7, 4, 1, 2, 1, 2, 3)
    parameters = 4 * 4 * 2 + 4 * 4 + 3 * 4 * 3 + 7 * 4
    volume, flops = bench.work(
        shape, torch.bfloat16, bench.Config(rows=4, group=2, prompt=5), [3, 1, 2, 2]
    )
    seen = 6 + 1 + 3 + 3
    assert volume == 2 * parameters * 3 + 8 * (seen + 5 * 3 + 5 * 2)
    assert flops == 2 * parameters * 8 + 4 * 2 * 2 * (seen + 5 * 8)


@pytest.mark.extra
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs transformers (requirements-extra.txt)",
)
def test_bench_runs_beside_transformers():
    """Catches a peer that is silently left out although it is installed, or that does not do the
    same work."""
    printed = script(ROOT, "bench.py", "sampler", *SMALL, "--device", "cpu", "--ladder", "none")
    assert re.search(r"ours \(\w+\) is [0-9.]+ times transformers 5", printed)


@pytest.mark.extra
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs transformers (requirements-extra.txt)",
)
def test_our_gpt_is_a_llama():
    """Catches a difference from the field's architecture: our weights in transformers' Llama give
    the same logits, 1e-4 in fp32."""
    import transformers

    from model import GPT, ModelConfig

    torch.manual_seed(0)
    m = ModelConfig(97, 64, 3, 4, 2, 16, 96, 64)
    gpt = GPT(m)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            max_position_embeddings=64,
            rms_norm_eps=m.norm_eps,
            rope_theta=m.rope_theta,
            tie_word_embeddings=True,
        )
    )
    weights = {
        "model.embed_tokens.weight": gpt.embed.weight,
        "model.norm.weight": gpt.norm.weight,
        "lm_head.weight": gpt.embed.weight,
    }
    for i, block in enumerate(gpt.blocks):
        q, k, v = block.qkv.weight.split([64, 32, 32])
        gate, up = block.gate_up.weight.chunk(2)
        names = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), (q, k, v, block.out.weight)))
        weights |= {f"model.layers.{i}.self_attn.{name}.weight": w for name, w in names.items()}
        weights |= {
            f"model.layers.{i}.mlp.{name}.weight": w
            for name, w in zip(("gate_proj", "up_proj", "down_proj"), (gate, up, block.down.weight))
        }
        weights |= {
            f"model.layers.{i}.input_layernorm.weight": block.norm1.weight,
            f"model.layers.{i}.post_attention_layernorm.weight": block.norm2.weight,
        }
    llama.load_state_dict(weights)
    tokens = torch.randint(0, 97, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            gpt(tokens) @ gpt.embed.weight.T, llama(tokens).logits, atol=1e-4, rtol=0
        )
