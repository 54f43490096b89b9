"""Two processes on this machine, by gloo: the step, the rollouts, the questions and the tables of
one; and how they end when one of them fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PATIENCE, ROOT

from model import load_checkpoint
from runtime import distributed, memory
from runtime.checkpoints import load_state, saved
from runtime.device import pick_device
from runtime.flags import BadInput
from runtime.transcripts import lines_of
from verifier.math_verify import MathVerify

RUN = (
    "train.py",
    "--preset",
    "smoke",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--base-tokens",
    "300000",
    "--eval-questions",
    "63",
    "--save-every",
    "1",
)
HARD = (
    "--kl-coef",
    "0.05",
    "--kl",
    "k1",
    "--recompute",
    "yes",
    "--update",
    "alternating",
    "--sources",
    "wrong",
    "--resample",
    "2",
    "--normalize",
    "token",
    "--tokens-per-microbatch",
    "500",
    "--epochs",
    "2",
    "--offload-optimizer",
)


def start(folder, words, processes=1, **options):
    """A script (a file of this project's, or one in `folder`) on so many processes of one thread
    each -> subprocess.Popen."""
    script = str(ROOT / words[0]) if (ROOT / words[0]).exists() else words[0]
    torchrun = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
        if processes > 1
        else []
    )
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, *torchrun, script, *words[1:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process, code=0):
    """-> what it printed on the screen, and as errors. A hang is a failure."""
    try:
        printed, wrong = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, printed + wrong
    return printed, wrong


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the same runs on one process and on two: a single step, a few, and a few with
    all that makes ranks differ."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, words in dict(
        step=("--tokens", "1"), few=("--tokens", "20000"), hard=("--tokens", "25000", *HARD)
    ).items():
        for processes in (1, 2):
            finished(start(folder, [*RUN, *words, "--name", f"{name}{processes}"], processes))
    return folder


def weights(folder, run):
    return load_checkpoint(folder / "out" / run / "checkpoint.pt")[0].state_dict()


def farthest(folder, one, other):
    """Largest difference of two runs' parameters."""
    ours, theirs = weights(folder, one), weights(folder, other)
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def lines(folder, run):
    """The log without what depends on the clock, or on the shape of a batch: rounding of lengths,
    last bits."""
    loose = (
        "packed",
        "padding",
        "seconds",
        "tokens_per_s",
        "seconds_sampling",
        "seconds_training",
        "seconds_transcripts",
        "seconds_heldout",
        "peak_gb",
        "gauge_max",
        "gauge_mean",
    )
    return [
        {k: v for k, v in json.loads(line).items() if k not in loose}
        for line in (folder / f"out/{run}/metrics.jsonl").read_text().splitlines()
    ]


# ---- the same numbers ----------------------------------------------------------------------------


def test_one_step_is_that_of_one_process(runs):
    """Catches a mean of ranks' means, gradients averaged that should be summed, and a slice updated
    twice: parameters to 1e-5, the log, and counts of the tables (63 questions do not divide by
    2)."""
    assert farthest(runs, "step1", "step2") < 1e-5 and lines(runs, "step1")[0]["updates"] == 2
    for name in ("step", "few", "hard"):
        assert json.loads((runs / f"out/{name}1/result.json").read_text()) == json.loads(
            (runs / f"out/{name}2/result.json").read_text()
        )


@pytest.mark.parametrize("name", ["few", "hard"])
def test_the_same_trees_are_kept(runs, name):
    """Catches a rank that does not join the pass for the entropies (a hang), and trees of another
    rank."""
    ours, theirs = (list(lines_of(runs / f"out/{name}{n}/rollouts.jsonl")) for n in (2, 1))
    assert len(ours) == len(theirs) == 2 * len(lines(runs, f"{name}1"))
    for mine, tree in zip(ours, theirs):
        nodes = [
            [
                node
                for attempt in t["attempts"]
                for node in (attempt, *attempt.get("corrections", ()))
            ]
            for t in (mine, tree)
        ]
        assert mine["question"] == tree["question"] and len(nodes[0]) == len(nodes[1]) >= 4
        for a, b in zip(*nodes):
            assert (
                a["tokens"] == b["tokens"]
                and a["advantage"] == b["advantage"]
                and a["entropy"] == pytest.approx(b["entropy"], abs=1e-3)
            )


@pytest.mark.parametrize("name", ["few", "hard"])
def test_whole_runs_are_those_of_one_process(runs, name):
    """Catches ranks that make different numbers of passes or steps, a layer that is missing on one
    of them, groups resampled by rank, a reference that is not gathered, moments on the host that
    are mixed up; and rollouts or questions that depend on the number of processes."""
    ours, theirs = lines(runs, f"{name}2"), lines(runs, f"{name}1")
    assert len(ours) == len(theirs) >= 3 and sum(line["updates"] for line in theirs) >= 4
    for mine, line in zip(ours, theirs):
        assert mine == pytest.approx(line, rel=1e-3, abs=1e-5), line["step"]
        assert all(
            mine[k] == line[k]
            for k in (
                "generated",
                "accuracy1",
                "accuracy2",
                "reward1",
                "reward2",
                "length1",
                "length2",
                "signal1",
                "signal2",
                "updates",
                "resampled",
            )
            if k in line
        )
    assert farthest(runs, f"{name}1", f"{name}2") < 1e-4 and (
        name == "few" or sum(line["resampled"] for line in theirs) > 0
    )


def test_the_same_rollouts_are_drawn(runs):
    """Catches random numbers or questions that depend on who samples: token by token, in both
    layers, resampled ones included."""
    drawn = []
    for processes in (1, 2):
        finished(start(runs, [write(runs, "rollouts.py", ROLLOUTS), str(processes)], processes))
        drawn.append(
            [
                tuple(row)
                for rank in range(processes)
                for row in json.loads((runs / f"rollouts-{processes}-{rank}.json").read_text())
            ]
        )
    assert len(drawn[0]) > 16 * 4 * 2 and sorted(drawn[0]) == sorted(drawn[1])


def test_moments_are_whole_after_a_step_that_taught_nothing(runs):
    """Catches a state that holds one rank's slice of Adam's moments: what the pass for the
    transcripts gathers stays so until a backward pass, and there is none in a step whose groups all
    have equal rewards."""
    finished(start(runs, [write(runs, "moments.py", MOMENTS)], 2))
    found = torch.load(runs / "moments.pt", weights_only=True)
    assert len(found) > 10 and all(
        kind == "Tensor" and tuple(shape) == tuple(like) for kind, shape, like in found
    )


MOMENTS = """
import torch
import parallel, starting, train, transcripts
from eval import make_sampler
from memory import make_optimizer
def main():
    c = train.Config(**(train.PRESETS["smoke"] | dict(base_tokens=300000, dtype="float32", device="cpu")))
    setup = starting.prepare(c)
    policy, _ = setup.load()
    sampler = make_sampler(policy, 0, 300)
    shapes = [p.shape for p in policy.parameters()]
    distributed.shard(policy)
    optimizer = make_optimizer(policy, 1e-4, False)
    trees = train.rollout(sampler, setup, 0)
    train.learn(policy, None, optimizer, trees, setup.c)
    from pathlib import Path
    transcripts.record(Path("."), policy, trees[0], setup.encoding, setup.c, 1, 0)
    moments = distributed.gathered_optimizer(optimizer, policy.parameters())
    if distributed.rank() == 0:
        torch.save([(type(m["exp_avg"]).__name__, m["exp_avg"].shape, like) for m, like in zip(moments["state"].values(), shapes)], "moments.pt")
distributed.run(main)
"""


ROLLOUTS = """
import dataclasses, json, sys
import parallel, starting, train
from eval import make_sampler
def main():
    c = train.Config(**(train.PRESETS["smoke"] | dict(base_tokens=300000, dtype="float32", device="cpu", resample=2)))
    setup = starting.prepare(c)
    sampler = make_sampler(setup.load()[0], 0, 300)
    rows = []
    for tree in train.rollout(sampler, setup, 3):
        for layer in tree.layers:
            c = layer.completions
            rows += [(layer.completions.depth, int(tree.slots[layer.questions[i]]), int(c.numbers[i]), c.prompts[i // c.n], c.sampled[i], float(layer.advantages[i])) for i in range(len(c))]
    json.dump(rows, open(f"rollouts-{sys.argv[1]}-{distributed.rank()}.json", "w"))
distributed.run(main)
"""


def write(folder, name, text):
    (folder / name).write_text(text)
    return name


def test_shares_are_everything_once(monkeypatch):
    """Catches a question that two ranks have, or none; and shares that differ by more than one."""
    for size in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        for count in (0, 1, 7, 8, 64):
            shares = []
            for rank in range(size):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                shares.append(distributed.share(count))
            assert [i for share in shares for i in share] == list(range(count)) and max(
                map(len, shares)
            ) - min(map(len, shares)) <= 1


def test_traffic_is_what_torch_moves(runs):
    """Catches a computed volume that is not the real one: bytes of the collectives of a step,
    counted where torch is asked for them."""
    finished(start(runs, [write(runs, "traffic.py", TRAFFIC)], 2))
    found = json.loads((runs / "traffic.json").read_text())
    for dtype, counted, computed in found:
        assert counted == pytest.approx(computed, rel=0.01), dtype


TRAFFIC = """
import json
import torch, torch.distributed as dist
import parallel, train
from model import GPT, ModelConfig
from sample import Sampler
moved = []
def counting(*names):                     # of torch 2.13, of earlier ones
    name = next(name for name in names if hasattr(dist, name))
    real = getattr(dist, name)
    def call(*args, **keywords):
        moved.append(max(x.nbytes for x in (*args, *keywords.values()) if isinstance(x, torch.Tensor)) / 2)
        return real(*args, **keywords)
    setattr(dist, name, call)
def main():
    counting("all_gather_single", "all_gather_into_tensor")
    counting("reduce_scatter_single", "reduce_scatter_tensor")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, frozen = (GPT(ModelConfig(400, 64, 3, 4, 2, 16, 96, 64), dtype) for _ in range(2))
        frozen.to(dtype).requires_grad_(False)
        distributed.broadcast(model)
        sampler = Sampler(model, workers=1)
        distributed.shard(model)
        distributed.shard(frozen)
        train.idle_pass(model, frozen)    # the first gathers the reference's embeddings, which stay
        moved.clear()
        for _ in range(3):
            train.idle_pass(model, frozen)
        counted, parts = sum(moved), distributed.traffic(model.config, dtype, 2, 3, True)
        found.append((str(dtype), counted, sum(parts.values()) - parts["sampler"]))
    if distributed.rank() == 0:
        json.dump(found, open("traffic.json", "w"))
distributed.run(main)
"""


# ---- going on ------------------------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_processes(runs):
    """Catches states that hold slices, or moments dealt to the wrong parameters: 2 processes go on
    exactly; 1 goes on where 2 stopped, and 2 where 1 did, to the weights of the undisturbed run."""
    for before, after in ((2, 2), (1, 2), (2, 1)):
        name = f"from{before}to{after}"
        finished(start(runs, [*RUN, "--tokens", "20000", "--keep", "99", "--name", name], before))
        for step, path in saved(runs / f"out/{name}/state"):
            if step > 2:
                path.unlink()
        printed, _ = finished(start(runs, ["train.py", "--resume", f"out/{name}"], after))
        assert "resume: from" in printed and "step-0000002" in printed
        assert [line["step"] for line in lines(runs, name)] == [
            line["step"] for line in lines(runs, "few1")
        ]
        assert farthest(runs, name, f"few{before}") < 1e-5 and (
            before != after or farthest(runs, name, "few2") == 0
        )
    moments = [load_state(saved(runs / f"out/few{n}/state")[0][1])["optimizer"] for n in (1, 2)]
    assert all(
        (moments[0][i][name] - moments[1][i][name]).abs().max() < 1e-4
        for i in moments[0]
        for name in moments[0][i]
    )


def test_a_stop_is_everyones(runs):
    """Catches ranks that stop after different steps, and wait for each other for ever: a
    scheduler's SIGTERM, sent to each of them and again by torchrun, finishes the step on all."""
    running = start(runs, [*RUN, "--tokens", "2000000", "--name", "stopped"], 2)
    while running.poll() is None and not saved(runs / "out/stopped/state"):
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
    ).stdout.split()
    for rank in map(int, ranks):  # a scheduler signals everybody, and torchrun passes its own on
        os.kill(rank, signal.SIGTERM)
    running.send_signal(signal.SIGTERM)
    printed, wrong = running.communicate(timeout=PATIENCE)
    steps = len(lines(runs, "stopped"))
    assert (
        f"stopped after step {steps}" in printed
        and saved(runs / "out/stopped/state")[0][0] == steps
    ), wrong


# ---- going wrong ---------------------------------------------------------------------------------

BROKEN = """
import os, signal, sys, time
import parallel, train
from flags import BadInput
how, real = sys.argv.pop(1), train.one_step
def one_step(*args):
    found = real(*args)
    if found[0]["step"] == 2 and distributed.rank() == 1:
        if how == "raise":
            raise ValueError("the cat sat on the cable")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise BadInput("rank 1 has no disk")
    if found[0]["step"] == 2 and how == "sleep":
        time.sleep(1000)
    return found
train.one_step = one_step
distributed.run(train.main)
"""


@pytest.mark.parametrize("how", ["raise", "kill", "say", "sleep"])
def test_a_rank_that_fails_takes_the_others_down(runs, how):
    """Catches a hang, and an error buried under those of its victims: a rank that raises, is
    killed, or has bad input ends the run, its own words are shown, and those of the others (who
    lost it, or are asleep) are not. What was saved is there."""
    name = f"broken-{how}"
    _, wrong = finished(
        start(
            runs,
            [
                write(runs, "broken.py", BROKEN),
                how,
                *RUN[1:],
                "--tokens",
                "2000000",
                "--name",
                name,
            ],
            2,
        ),
        code=1,
    )
    own = wrong.partition("torch/distributed/elastic")[0]
    said = {
        "raise": "error: ValueError: the cat sat on the cable (train.py:",
        "kill": "error: rank 0 lost another process",
    }.get(how, "error: rank 1 has no disk")
    assert (
        own.count(said) == 1
        and "Traceback" not in own
        and ("a fault of this code" in own) == (how == "raise")
        and ("Connection" in own) == (how == "kill")
    ), wrong
    assert ("SIGKILL" in wrong) == (how == "kill") and saved(runs / f"out/{name}/state")[0][0] >= 1


@pytest.mark.parametrize(
    "processes, words, says",
    [
        (
            3,
            RUN,
            "error: --prompts 16 does not divide into --minibatches 2 on each of 3 processes: "
            "choose a multiple of 6",
        ),
        (
            2,
            [*RUN, "--prompts", "6"],
            "error: --prompts 6 does not divide into --minibatches 2 on each of 2 processes: "
            "choose a multiple of 4",
        ),
        (2, ["pretrain.py"], "error: this script runs in one process, without torchrun"),
        (2, ["train.py", "--attemps", "3"], "did you mean --attempts?"),
        (2, ["train.py", "--resume", "nowhere"], "nowhere holds no state to go on from"),
        (2, ["train.py", "--init", "nowhere", "--data", "nothing.jsonl"], "nothing is downloaded"),
    ],
)
def test_bad_input_is_said_once(tmp_path, processes, words, says):
    """Catches a sentence said by every rank, or none; and files left behind."""
    _, wrong = finished(start(tmp_path, list(words), processes), code=1)
    assert (
        wrong.count(says) == (1 if words[0] == "train.py" else processes)
        and "exitcode  : 2" in wrong
    )
    assert wrong.partition(says)[0].count("Traceback") == 0 and not list(tmp_path.glob("out/*"))


def test_more_processes_than_gpus_is_said(monkeypatch):
    """Catches two processes on one GPU, which would share its memory unasked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadInput, match="--nproc_per_node"):
        pick_device("auto")
    assert pick_device("cpu") == "cpu"


def test_ranks_that_differ_are_named(monkeypatch):
    """Catches two runs in one: machines with other data or other flags are told, before they meet
    in a collective."""
    monkeypatch.setattr(distributed, "everyone", lambda digest: [digest, digest[::-1]])
    with pytest.raises(BadInput, match="do not have the same questions"):
        distributed.agree("questions", ["one"])


def test_math_verifys_worker_starts_under_torchrun(monkeypatch, tmp_path):
    """Catches a verifier that takes itself for one of torchrun's processes, and answers nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    write(
        tmp_path,
        "math_verify.py",
        "parse = lambda text, **_: text\nverify = lambda gold, answer, **_: gold == answer",
    )
    for name, value in dict(WORLD_SIZE="2", LOCAL_RANK="1", PYTHONPATH=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    verifier = MathVerify()
    assert verifier.same("1", "1") and not verifier.same("1", "2")
    verifier.close()


def test_evaluation_is_shared(runs):
    """Catches questions evaluated twice or by nobody: eval.py on two processes prints and writes
    what one does, and every transcript is somewhere."""
    words = [
        "eval.py",
        "--checkpoint",
        "out/few1/checkpoint.pt",
        "--questions",
        "33",
        "--samples",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    for processes in (1, 2):
        finished(
            start(
                runs,
                [*words, "--json", f"{processes}.json", "--transcripts", f"t{processes}"],
                processes,
            )
        )
    one, two = (json.loads((runs / f"{n}.json").read_text())["sets"] for n in (1, 2))
    assert one == two
    transcripts = [
        sorted(
            line
            for path in (runs / f"t{n}").glob("*.jsonl")
            for line in path.read_text().splitlines()
        )
        for n in (1, 2)
    ]
    assert (
        transcripts[0] == transcripts[1]
        and len(transcripts[0]) == 33 * 3
        and len(list((runs / "t2").glob("*.jsonl"))) == 2
    )


def test_a_rank_plans_for_its_part():
    """Catches a plan that counts whole masters on every rank, or forgets what is gathered."""
    known = dict(
        compute=torch.bfloat16,
        tokens=16384,
        prompts=32,
        attempts=8,
        corrections=4,
        prompt=512,
        completion=1024,
        reference=True,
    )
    shape = memory.SHAPES["Qwen2.5-Math-7B"]
    one, eight = memory.plan(shape, **known), memory.plan(shape, **known, ranks=8)
    assert one["gathered"] == 0 and all(
        eight[what] == one[what] // 8 for what in ("masters and gradients", "Adam", "KV cache")
    )
    embeddings = 2 * 2 * shape.vocab_size * shape.width
    assert eight["reference"] == pytest.approx(
        (one["reference"] - embeddings) / 8 + embeddings, rel=1e-3
    )
    assert eight["weights"] == one["weights"] and 5e9 < eight["gathered"] < 15e9
