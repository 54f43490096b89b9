"""The loop, end to end and in parts: invariance to micro-batches, determinism, and a run that
learns in both layers."""

import copy
import dataclasses
import errno
import json
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace as Namespace

import pytest
import torch
from conftest import PATIENCE, ROOT, script
from test_mgrpo import scripted_rollout

import train
from mgrpo import Sampling, collect, completion_logprobs, pad_rows
from report.trees import lines_of
from runtime import log
from runtime.checkpoints import Progress, load_checkpoint
from runtime.flags import BadInput
from runtime.log import rollout_metrics, tree_text
from sample import Sampler
from tasks.legacy import draw, make_task, prompts_and_golds
from tasks.problems import Problem
from tasks.tokenizer import build_encoding
from train import SUMS, Config, Trees, accumulate, learn, optimiser_steps


@pytest.fixture
def rollout(gpt):
    """A real two-layer rollout of the random model, with rewards made up (it never answers), and
    its config."""
    encoding, task = build_encoding(), make_task("solve", 2, 2, 5)
    problems = [draw(task, "train", 0, i) for i in range(4)]
    c = Config(attempts=3, corrections=2, prompts=4, max_new_tokens=12, dtype="float32")
    layers = collect(Sampler(gpt), encoding, problems, 3, 2, Sampling(12, 1.0, 5))
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.advantages = torch.randn(len(layer.texts), generator=generator)
        layer.trained = torch.rand(len(layer.texts), generator=generator) < 0.8
        layer.advantages[~layer.trained] = 0
    return gpt, layers, c


def grown(layers):
    """These layers as one rollout of all of a step's questions."""
    return [Trees(layers, None, torch.arange(int(layers[0].questions.max()) + 1))]


def gradient(gpt, layers, c, reference=None):
    """The gradient of one optimiser step on all rows, and the diagnostics."""
    gpt.zero_grad()
    sums = dict.fromkeys(SUMS, 0.0)
    assert (
        accumulate(
            gpt,
            reference,
            grown(layers),
            [(0, layer, torch.arange(len(layer.texts))) for layer in layers],
            c,
            sums,
            True,
        )
        > 0
    )
    return torch.cat([p.grad.flatten() for p in gpt.parameters()]), sums


@pytest.mark.parametrize("normalize", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_gradient_does_not_depend_on_micro_batches(rollout, normalize, kl_coef):
    """Catches a mean per micro-batch, and a tree that is not its rows: all at once, in several
    micro-batches, and one row at a time (1 token allows no second), packed as trees or padded, must
    give one gradient, to 1e-5 of its size."""
    gpt, layers, c = rollout
    reference = copy.deepcopy(gpt).requires_grad_(False) if kl_coef else None
    if reference:
        reference.embed.weight.mul_(1.1)
    results = [
        gradient(
            gpt,
            layers,
            dataclasses.replace(
                c, pack=kind, tokens_per_microbatch=most, normalize=normalize, kl_coef=kl_coef
            ),
            reference,
        )
        for kind in ("tree", "rows")
        for most in (10**6, 200, 1)
    ]
    whole, sums = results[0]
    assert whole.norm() > 1e-3
    for other, found in results[1:]:
        assert (other - whole).norm() < 1e-5 * whole.norm()
        assert float(found["loss"]) == pytest.approx(float(sums["loss"]), abs=1e-5)


def test_gradient_equals_the_equation(rollout):
    """The oracle for packing, sorting, skipping and weights together: (2) written out row by row
    over ALL rows, with w = 0.5."""
    gpt, layers, c = rollout
    found, _ = gradient(
        gpt, layers, dataclasses.replace(c, layer2_weight=0.5, tokens_per_microbatch=250)
    )
    gpt.zero_grad()
    for layer, w in zip(layers, (1.0, 0.5)):
        completions = layer.completions
        for i in range(len(layer.texts)):
            prompt, n = completions.prompts[i // completions.n], int(completions.lengths[i])
            ids = torch.tensor([prompt + completions.tokens[i, :n].tolist()])
            logp = (
                (gpt(ids)[0] @ gpt.head.weight.T)
                .log_softmax(-1)[len(prompt) - 1 : -1]
                .gather(1, ids[0, len(prompt) :, None])[:, 0]
            )
            ratio = (logp - completions.logprobs[i, :n]).exp()
            A = layer.advantages[i]
            objective = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).mean() / len(layer.texts)
            (-w * objective).backward()
    expected = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_every_row_is_trained_once(rollout):
    """Catches questions dropped or dealt twice by the minibatches, and a group torn apart."""
    _, layers, c = rollout
    for update, steps in (("joint", 2), ("alternating", 4)):
        plan = optimiser_steps(grown(layers), dataclasses.replace(c, update=update))
        assert len(plan) == steps
        for layer in layers:
            mine = [rows for parts in plan for _, part, rows in parts if part is layer]
            assert sorted(torch.cat(mine).tolist()) == list(range(len(layer.texts)))
            assert not set(layer.parents[mine[0]].tolist()) & set(layer.parents[mine[1]].tolist())


def test_gauge_is_near_zero_before_the_first_update(rollout):
    """Catches the sampler and the trainer drifting apart, as the log line shows it: fp32, so below
    1e-4, and the ratio is 1."""
    gpt, layers, c = rollout
    optimizer = torch.optim.AdamW(gpt.parameters(), 0.0)
    found = learn(gpt, None, optimizer, grown(layers), dataclasses.replace(c, epochs=2))
    assert 0 < found["gauge_mean"] <= found["gauge_max"] < 1e-4 and found["ratio"] == pytest.approx(
        1, abs=1e-4
    )
    assert found["updates"] == 4 and found["clipped"] == 0 and found["entropy"] > 0


def test_layers_in_steps_of_their_own_have_the_same_gauge_and_loss(rollout):
    """Catches a gauge that never sees layer 2, and a loss that is half of -J: at learning rate 0
    both ways of stepping see the same."""
    gpt, layers, c = rollout
    # the sampler of layer 2 is off, in one token of each row
    layers[1].completions.logprobs[:, 0] -= 0.3
    found = {
        update: learn(
            gpt,
            None,
            torch.optim.AdamW(gpt.parameters(), 0.0),
            grown(layers),
            dataclasses.replace(c, update=update, epochs=2),
        )
        for update in ("joint", "alternating")
    }
    assert found["alternating"]["updates"] == 2 * found["joint"]["updates"] == 8
    for name in ("loss", "gauge_max", "gauge_mean", "entropy"):
        assert found["alternating"][name] == pytest.approx(found["joint"][name], rel=1e-4), name
    assert (
        found["joint"]["gauge_max"] == pytest.approx(0.3, abs=1e-3)
        and abs(found["joint"]["loss"]) > 1e-3
    )


def test_no_signal_no_step(rollout):
    """Catches weights moved by Adam's momentum alone when every group has equal rewards."""
    gpt, layers, c = rollout
    before = copy.deepcopy(gpt.state_dict())
    for layer in layers:
        layer.advantages.zero_()
    found = learn(gpt, None, torch.optim.AdamW(gpt.parameters(), 0.1), grown(layers), c)
    assert found["updates"] == 0 and all(
        torch.equal(before[k], v) for k, v in gpt.state_dict().items()
    )


def test_a_nonfinite_gradient_is_skipped(rollout):
    """Catches NaN written into the weights, and into the next checkpoint: the optimiser step is
    skipped and counted, the other one made."""
    gpt, layers, c = rollout
    before = [p.detach().clone() for p in gpt.parameters()]
    layers[0].advantages[0], layers[0].trained[0] = float("nan"), True
    found = learn(gpt, None, torch.optim.AdamW(gpt.parameters(), 0.1), grown(layers), c)
    assert (
        found["skipped"] == 1
        and found["updates"] == 1
        and all(torch.isfinite(p).all() for p in gpt.parameters())
    )
    assert any(not torch.equal(a, b) for a, b in zip(before, gpt.parameters()))


def test_five_gradients_that_are_not_finite_end_the_run(rollout, tmp_path, capsys):
    """Catches a run that goes on for days on NaN, and one that throws the evidence away: each is
    kept, five in a row end the run."""
    _, layers, c = rollout
    progress, metrics = (
        Progress(step=7, generated=1),
        dict(updates=0, skipped=2, accuracy1=0.5, cut1=0.0),
    )
    for _ in range(2):
        train.watch(tmp_path, progress, metrics, grown(layers), c)
    train.watch(tmp_path, progress, metrics | dict(updates=1), grown(layers), c)
    assert progress.skipped == 0
    with pytest.raises(BadInput, match="6 gradients in a row"):
        for _ in range(3):
            train.watch(tmp_path, progress, metrics, grown(layers), c)
    kept = torch.load(tmp_path / "not-finite-7.pt", weights_only=True)
    assert (
        torch.equal(kept[1]["advantages"], layers[1].advantages)
        and kept[0]["prompts"] == layers[0].completions.prompts
    )


def test_metrics_of_a_hand_written_tree(encoding):
    """Catches fix and break swapped, or counted per attempt where the paper counts per answer."""
    layers, _ = scripted_rollout(encoding)
    found = rollout_metrics(layers)
    assert found["accuracy1"] == 0.5 and found["accuracy2"] == 5 / 8
    # wrong attempts: 1, 0 / 1, 1; right ones: 1, 0 / 1, 0
    assert found["fix"] == 3 / 8 and found["broke"] == 2 / 8
    assert found["fix"] - found["broke"] == found["accuracy2"] - found["accuracy1"]
    assert (
        found["signal1"] == 1.0
        and found["signal2"] == 3 / 4
        and found["cut1"] == found["cut2"] == 0
    )


def test_tree_text_shows_the_whole_tree(encoding):
    """Catches a transcript that lacks the phrase, a node, or who was right."""
    from tasks.problems import Problem

    layers, sampler = scripted_rollout(encoding)
    text = tree_text(layers, Problem("a", "1", None), 0, encoding)
    assert (
        text.count("├─") == 2 + 4
        and text.count("WRONG") == 1 + 2
        and sampler.asked[0].strip() in text
        and "gold: 1" in text
    )


@pytest.mark.parametrize("resample", [0, 1, 3])
def test_questions_that_teach_nothing_give_way(monkeypatch, resample):
    """Catches a cap that is not kept, questions redrawn that teach, replaced ones that are trained,
    or replacing ones that are not; and a slot whose questions are not a function of (seed, step,
    slot, how many times)."""
    c, asked = Config(prompts=6, attempts=2, minibatches=2, resample=resample, max_new_tokens=9), []

    def collect(sampler, encoding, problems, *_, **__):
        """Two attempts a question; on the first draw questions 1 and 4 teach nothing, of those that
        replace them the first does not either."""
        asked.append([problem.question for problem in problems])
        questions = torch.arange(len(problems)).repeat_interleave(2)
        teaches = (questions % 3 != 1) if len(asked) == 1 else (questions > 0)
        return [
            Namespace(
                questions=questions, active=lambda kl: teaches, completions=Namespace(depth=1)
            )
        ]

    monkeypatch.setattr(train, "collect", collect)
    setup = Namespace(c=c, task=make_task("solve", 3, 4, 11), encoding=None, verifier=None)
    trees = train.rollout(None, setup, 5)
    assert [tree.slots.tolist() for tree in trees] == [
        [[0, 1, 2, 3, 4, 5]],
        [[0, -1, 2, 3, -1, 5], [1, 4]],
        [],
        [[0, -1, 2, 3, -1, 5], [-1, 4], [-1], [1]],
    ][resample]
    trained = [
        int(trees[i].slots[q])
        for parts in optimiser_steps(trees, c)
        for i, layer, rows in parts
        for q in layer.questions[rows]
    ]
    assert sorted(trained) == [slot for slot in range(6) for _ in range(2)]
    flat = [question for questions in asked for question in questions]
    assert len(set(flat)) == len(flat) == 6 + [0, 2, 0, 4][resample]
    first, asked[:] = list(asked), []
    train.rollout(None, setup, 5)
    assert asked == first


def test_layer_2_can_weigh_nothing(rollout):
    """Catches the weight applied to the wrong layer, or not at all: with w = 0 the gradient is that
    of layer 1 alone."""
    gpt, layers, c = rollout
    both, _ = gradient(gpt, layers, dataclasses.replace(c, layer2_weight=0.0))
    alone, _ = gradient(gpt, layers[:1], c)
    whole, _ = gradient(gpt, layers, c)
    torch.testing.assert_close(both, alone)
    assert (whole - alone).norm() > 0.1 * alone.norm()


def test_nobody_goes_on_to_layer_2(encoding, gpt):
    """Catches a crash when every attempt is right and only wrong ones go on: the step is then layer
    1's alone."""
    from test_mgrpo import Scripted

    from tasks.problems import Problem

    sampler = Scripted(encoding, ["<answer>1</answer>"] * 4, [])
    layers = collect(
        sampler, encoding, [Problem("a", "1", None)] * 2, 2, 2, Sampling(9, 1.0, 0), sources="wrong"
    )
    found = rollout_metrics(layers) | learn(
        gpt, None, torch.optim.AdamW(gpt.parameters(), 0.1), grown(layers), Config(prompts=2)
    )
    assert (
        len(layers) == 1
        and found["updates"] == 0
        and found["signal1"] == 0
        and "reward2" not in found
    )


# ---- whole runs ----------------------------------------------------------------------------------

# named, since which type is faster on a tiny model is a close race, and another type is another
# base
SMOKE = ("--dtype", "float32")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`python train.py --preset smoke` in a folder of its own -> folder, what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, script(folder, "train.py", "--preset", "smoke", *SMOKE)


def test_smoke_run_learns_to_correct(smoke):
    """Catches a loop that runs but does not learn: on `solve` the second look must gain far more
    than the base's (seen: 18 points)."""
    folder, printed = smoke
    result = json.loads((folder / "out/solve-mgrpo-0/result.json").read_text())
    assert result["MGRPO"]["greedy"]["t2"][0] > result["base"]["greedy"]["t2"][0] + 0.08
    assert result["MGRPO"]["greedy"]["c2i"][0] < result["base"]["greedy"]["c2i"][0] - 0.1
    assert all(
        word in printed
        for word in ("Acc@t1", "Acc@t2", "Δ(t1,t2)", "Δ i→c", "Δ c→i", "base", "MGRPO", "held-out")
    )


def test_both_layers_rewards_rise_for_three_seeds(tmp_path):
    """Catches a layer that gets no gradient, or one of the wrong sign: on `chain`, where the base
    slips in either turn, the rewards of both layers rise from the first quarter of the steps to the
    last (700 and 2,100 samples each: by .03 to .05, standard errors .015 and .01) for each of three
    seeds."""
    for seed in range(3):
        script(
            tmp_path,
            "train.py",
            "--preset",
            "smoke",
            *SMOKE,
            "--task",
            "chain",
            "--seed",
            str(seed),
        )
        lines = (tmp_path / f"out/chain-mgrpo-{seed}/metrics.jsonl").read_text().splitlines()
        steps, quarter = [json.loads(line) for line in lines], len(lines) // 4
        for reward in ("reward1", "reward2"):
            early, late = (
                sum(step[reward] for step in part) / quarter
                for part in (steps[:quarter], steps[-quarter:])
            )
            assert late > early + 0.01, (seed, reward)


def test_smoke_run_leaves_what_the_readme_promises(smoke):
    """Catches a missing file or field: config with versions, one JSON line a step, whole trees, a
    checkpoint."""
    run = smoke[0] / "out/solve-mgrpo-0"
    config = json.loads((run / "config.json").read_text())
    assert config["made_by"]["torch"] == torch.__version__ and {
        f.name for f in dataclasses.fields(Config)
    } <= set(config)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {name for name, _, _ in log.LINE} <= set(line) and line["gauge_max"] < 0.5
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 2 * len(
        (run / "metrics.jsonl").read_text().splitlines()
    )
    assert (
        "solve-mgrpo-0" in (run / "report.html").read_text()
        and f"{run.relative_to(smoke[0])}/report.html" in smoke[1].splitlines()[-1]
    )
    assert (run / "samples.md").read_text().count("best tree") >= 3 and (
        run / "checkpoint.pt"
    ).exists()


def test_eval_on_the_smoke_checkpoint(smoke):
    """Catches an eval.py that disagrees with train.py's own table: same questions, same greedy
    answers."""
    folder, _ = smoke
    # two processes sample
    printed = script(
        folder,
        "eval.py",
        "--checkpoint",
        "out/solve-mgrpo-0/checkpoint.pt",
        "--questions",
        "256",
        "--samples",
        "2",
        "--json",
        "t.json",
        *SMOKE,
        threads=2,
    )
    mine, theirs = (
        json.loads((folder / "t.json").read_text())["greedy"],
        json.loads((folder / "out/solve-mgrpo-0/result.json").read_text())["MGRPO"],
    )
    assert (
        mine["t1"] == theirs["greedy"]["t1"]
        and mine["t2"] == theirs["greedy"]["t2"]
        and "Acc@t2" in printed
    )
    t1, t2, delta, i2c, c2i = (mine[k][0] for k in ("t1", "t2", "delta", "i2c", "c2i"))
    assert delta == pytest.approx(t2 - t1, abs=1e-6) and delta == pytest.approx(i2c - c2i, abs=1e-6)


def test_same_seed_same_metrics_and_the_base_is_reused(smoke):
    """Catches hidden randomness: two short runs of one seed agree in every figure but the clock's
    and the process's memory; another seed differs."""
    folder, runs = smoke[0], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        printed = script(
            folder,
            "train.py",
            "--preset",
            "smoke",
            *SMOKE,
            "--tokens",
            "20000",
            "--eval-questions",
            "32",
            "--seed",
            str(seed),
            "--name",
            name,
        )
        assert "base: reusing out/base-" in printed
        lines = [
            json.loads(line)
            for line in (folder / "out" / name / "metrics.jsonl").read_text().splitlines()
        ]
        runs.append(
            [
                {
                    k: v
                    for k, v in line.items()
                    if "second" not in k and "_per_s" not in k and k != "peak_gb"
                }
                for line in lines
            ]
        )
    assert runs[0] == runs[1] != runs[2]


def test_every_switch_runs(smoke):
    """Catches a switch that crashes, or is not in the log: those that the default leaves alone, all
    in one short run."""
    folder = smoke[0]
    script(
        folder,
        "train.py",
        "--preset",
        "smoke",
        *SMOKE,
        "--tokens",
        "15000",
        "--eval-questions",
        "32",
        "--name",
        "switches",
        "--kl-coef",
        "0.01",
        "--kl",
        "k2",
        "--failed",
        "raw",
        "--sources",
        "balanced",
        "--epochs",
        "2",
        "--update",
        "alternating",
        "--normalize",
        "token",
        "--clip-high",
        "0.28",
        "--format-weight",
        "0.2",
        "--layer2-weight",
        "0.5",
        "--tokens-per-microbatch",
        "400",
        "--pack",
        "rows",
        "--temperature",
        "0.9",
    )
    lines = [
        json.loads(line)
        for line in (folder / "out/switches/metrics.jsonl").read_text().splitlines()
    ]
    assert (
        lines[-1]["updates"] == 8
        and lines[-1]["kl"] > 0
        and lines[0]["reward1"] > lines[0]["accuracy1"]
    )


def test_kept_entropies_are_those_of_the_policy_that_sampled(smoke):
    """Catches entropies taken after the step has moved the weights: those of the first step's trees
    are the base's."""
    run = smoke[0] / "out/solve-mgrpo-0"
    base, _ = load_checkpoint(
        smoke[0] / json.loads((run / "config.json").read_text())["made_by"]["base"]
    )
    encoding, tree = build_encoding(), next(lines_of(run / "rollouts.jsonl"))
    prompt = prompts_and_golds(encoding, [Problem(tree["question"], tree["gold"], None)])[0][0]
    for attempt in tree["attempts"]:
        ids = [
            encoding.eot_token if piece == "<|endoftext|>" else encoding.encode_single_token(piece)
            for piece in attempt["tokens"]
        ]
        logp, entropy = completion_logprobs(base, pad_rows([prompt], [ids], "cpu"))
        assert attempt["entropy"] == pytest.approx(entropy[0].tolist(), abs=2e-4) and attempt[
            "logprobs"
        ] == pytest.approx(logp[0].tolist(), abs=2e-4)


def test_every_field_of_the_log_is_explained(smoke):
    """Catches a field of metrics.jsonl that README's table leaves out, and one that it explains and
    nobody writes."""
    rows = re.findall(
        r"^\|([^|]*)\| (`[^|]*`) \| [^|]+ \| [^|]*\|$", (ROOT / "README.md").read_text(), re.M
    )
    explained = {name for _, fields in rows for name in re.findall(r"`(\w+)`", fields)}
    lines = [
        json.loads(line)
        for path in smoke[0].glob("out/*/metrics.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert {name.removesuffix("_se") for line in lines for name in line} == explained and len(
        lines
    ) > 20
    shown = " ".join(column for column, _ in rows).replace("&#124;", "|")
    assert [title for _, title, _ in log.LINE if title.strip() not in shown] == []


def test_a_run_is_never_written_over(smoke):
    """Catches a second `python train.py` that destroys the first one's checkpoint."""
    folder = smoke[0]
    before = (folder / "out/a/checkpoint.pt").read_bytes()
    printed = script(
        folder,
        "train.py",
        "--preset",
        "smoke",
        *SMOKE,
        "--tokens",
        "2000",
        "--eval-questions",
        "8",
        "--name",
        "a",
        "--layers",
        "1",
    )
    assert "run: out/a.2" in printed and (folder / "out/a/checkpoint.pt").read_bytes() == before
    assert json.loads((folder / "out/a.2/result.json").read_text()).keys() == {"base", "GRPO"}


def test_the_log_is_json_whatever_happens(tmp_path):
    """Catches NaN in metrics.jsonl, which no strict reader takes, and learning rates rounded to
    0."""
    log.log(tmp_path, dict(step=2, cut1=0.0, loss=float("nan"), lr=5.4321987e-7, skipped=1))
    line = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert line == dict(step=2, cut1=0.0, loss=None, lr=5.4322e-7, skipped=1, cut=0.0)


# ---- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_in_one_sentence(smoke):
    """Catches a traceback of a disk that fills up in the middle of a run, and temporary files that
    it leaves: files may grow to 100 kB only."""
    folder, limit = smoke[0], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    words = [
        sys.executable,
        str(ROOT / "train.py"),
        "--preset",
        "smoke",
        *SMOKE,
        "--tokens",
        "20000",
        "--eval-questions",
        "16",
        "--name",
        "full",
    ]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=limit
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: out/full/state: step 1 could not be saved ("
    ) and not list((folder / "out").rglob("*.tmp"))
    assert (
        len((folder / "out/full/metrics.jsonl").read_text().splitlines()) == 1
        and "resume" not in done.stderr
    )


def test_no_half_made_run_folder(tmp_path, monkeypatch):
    """Catches a run's folder that stays behind without settings, and a temporary file, when the
    disk is full at the start."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=re.escape("config.json could not be written (No space left on device)")
    ):
        log.run_folder("run", dict(seed=0), "", 0.0)
    assert not list((tmp_path / "out").iterdir())


def test_other_threads_are_said_when_a_run_goes_on(tmp_path, monkeypatch, capsys):
    """Catches a run that goes on with sums rounded otherwise, and no word of it; and a word where
    nothing has changed."""
    here = log.versions()
    log.write_json(tmp_path / "config.json", dict(made_by=here))
    log.note_resume(tmp_path, {}, 3)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(log, "versions", lambda: here | dict(threads=here["threads"] + 1))
    for _ in range(2):  # the second time they are what they were
        log.note_resume(tmp_path, {}, 4)
    said = capsys.readouterr().out
    assert (
        said.count("resume: ") == 1
        and f"threads {here['threads'] + 1} (was {here['threads']})" in said
        and "bit for bit" in said
    )
