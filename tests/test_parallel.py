"""Two ranks on this machine, by gloo, against one: the step, the rollouts, the tables, the states; and
how all of them end when one fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PATIENCE, ROOT

import train
from report.trees import lines_of
from runtime import distributed
from runtime.checkpoints import load_checkpoint, load_state, saved
from runtime.device import pick_device
from runtime.flags import BadInput
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
    "600000",
    "--eval-questions",
    "63",
    "--save-every",
    "1",
)
# all that makes ranks differ in what they have to do
HARD = (
    "--group-sizes",
    "3,2,2",
    "--looks",
    "3",
    "--kl-coef",
    "0.05",
    "--recompute",
    "yes",
    "--method-args",
    "sources=wrong",
    "--normalize",
    "token",
    "--tokens-per-microbatch",
    "500",
    "--epochs",
    "2",
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


@pytest.mark.slow
def test_one_step_is_that_of_one_process(runs):
    """Catches a mean of ranks' means, gradients averaged that should be summed, and a slice updated
    twice: parameters to 1e-5, the log, and counts of the tables (63 questions do not divide by
    2)."""
    assert farthest(runs, "step1", "step2") < 1e-5 and lines(runs, "step1")[0]["updates"] == 2
    for name in ("step", "few", "hard"):
        assert json.loads((runs / f"out/{name}1/result.json").read_text()) == json.loads(
            (runs / f"out/{name}2/result.json").read_text()
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few", "hard"])
def test_the_same_trees_are_kept(runs, name):
    """Catches trees of another rank, or of none."""
    ours, theirs = (list(lines_of(runs / f"out/{name}{n}/rollouts.jsonl")) for n in (2, 1))
    assert len(ours) == len(theirs) == 2 * len(lines(runs, f"{name}1"))
    sizes = set()
    for mine, tree in zip(ours, theirs):
        assert mine["question"] == tree["question"]
        pairs = list(zip(nodes(mine), nodes(tree), strict=True))
        sizes.add(len(pairs))
        assert all(a["tokens"] == b["tokens"] for a, b in pairs)
        assert all(a["advantage"] == b["advantage"] for a, b in pairs)
    assert min(sizes) >= 3 and max(sizes) > 4  # of `hard`, right first answers go no further


def nodes(tree):
    """All answers of a tree as it is on disk."""
    for node in tree["answers"]:
        yield node
        yield from nodes(node)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few", "hard"])
def test_whole_runs_are_those_of_one_process(runs, name):
    """Catches ranks that make different numbers of passes or steps, a layer that is missing on one
    of them, a reference that is not gathered; and rollouts or questions that depend on the number
    of processes."""
    ours, theirs = lines(runs, f"{name}2"), lines(runs, f"{name}1")
    assert len(ours) == len(theirs) >= 3 and sum(line["updates"] for line in theirs) >= 4
    exact = ("generated", "accuracy", "reward", "length", "signal", "updates")
    for mine, line in zip(ours, theirs):
        assert mine == pytest.approx(line, rel=1e-3, abs=1e-5), line["step"]
        assert all(mine[k] == line[k] for k in line if k.startswith(exact))
    assert farthest(runs, f"{name}1", f"{name}2") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("group_sizes", [(4, 3), (3, 2, 2)])
def test_the_same_rollouts_are_drawn(runs, group_sizes):
    """Catches random numbers, phrases or questions that depend on the rank that samples: token by
    token, in all layers."""
    script, text = write(runs, "rollouts.py", ROLLOUTS), ",".join(map(str, group_sizes))
    drawn = []
    for processes in (1, 2):
        finished(start(runs, [script, text, str(processes)], processes))
        paths = [runs / f"rollouts-{text}-{processes}-{rank}.json" for rank in range(processes)]
        drawn.append(sorted(row for path in paths for row in json.loads(path.read_text())))
    rows = 16 * sum(train.rows_per_question(group_sizes))
    assert len(drawn[0]) == rows and drawn[0] == drawn[1]


ROLLOUTS = """
import json, sys
from mgrpo import MGRPO, SamplingParams, credit, rollout, step_seed
from runtime import distributed
from tasks.opening import BaseConfig, TaskConfig, make_sampler, open_model_and_task
def main():
    group_sizes = tuple(map(int, sys.argv[1].split(",")))
    policy, task = open_model_and_task(
        puzzle=TaskConfig(candidates=2, operations=2, modulus=5),      # as in the preset smoke
        base=BaseConfig(depth=2, heads=2, base_tokens=300_000),
        dtype="float32",
        device="cpu",
        turns=len(group_sizes),
    )
    share = distributed.share(16)
    problems = task.train_problems(0, 3, 16)[share.start : share.stop]
    sampling = SamplingParams(
        task.max_new_tokens, 1.0, seed=step_seed(0, 3), first_row=share.start * group_sizes[0]
    )
    sampler = make_sampler(policy, [task], len(group_sizes), cache_tokens=300)
    rows, layers = [], rollout(sampler, task, problems, group_sizes, sampling)
    credit(layers, MGRPO)
    for layer in layers:
        c = layer.completions
        for i in range(len(layer.texts)):
            question, phrase = layer.questions[i] + share.start, layer.phrases and layer.phrases[i]
            place = [layer.number, int(question), int(c.numbers[i]), phrase, c.prompts[i // c.n]]
            rows.append([*place, c.sampled[i], float(layer.advantages[i])])
    with open(f"rollouts-{sys.argv[1]}-{sys.argv[2]}-{distributed.rank()}.json", "w") as file:
        json.dump(rows, file)
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


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_slices_come_and_go_whole(tied, tmp_path):
    """Catches a state of one rank's slices, moments that go to other parameters, a tied head stored
    twice, and what a forward pass has left gathered taken for a slice. 3 steps, saved, loaded on
    two ranks and on one, 3 more steps: bit-equal to 6 on two ranks, and to rounding on one. 7 rows
    and 5 tokens do not divide by 2."""
    words = [write(tmp_path, "slices.py", SLICES), str(int(tied))]
    finished(start(tmp_path, [*words, "save"], 2))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if tied:
        head, embed = (state["weights"][f"{name}.weight"] for name in ("head", "embed"))
        assert head.data_ptr() == embed.data_ptr()
    finished(start(tmp_path, [*words, "load"], 2))
    finished(start(tmp_path, [*words, "load"], 1))
    whole, two, one = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("whole", "load2", "load1")
    )
    assert whole["moments"].keys() == two["moments"].keys() and len(two["moments"]) > 10
    for name, weight in whole["iterated"].items():
        assert torch.equal(weight, whole["weights"][name]), name
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, two["weights"][name]), name
        assert (weight - one["weights"][name]).abs().max() < 1e-5, name
    for name, moments in whole["moments"].items():
        for kind, value in moments.items():
            assert torch.equal(value, two["moments"][name][kind]), (name, kind)
    assert whole["norm"] == pytest.approx(one["norm"], rel=1e-5)


SLICES = """
import sys
import torch
from model import GPT, ModelConfig, token_logprobs
from runtime import distributed

def steps(model, optimizer, numbers):
    for number in numbers:
        tokens = torch.randint(0, 51, (7, 6), generator=torch.Generator().manual_seed(number))
        mine = distributed.share(7)
        rows = tokens[mine.start : mine.stop]
        hidden = model(rows[:, :-1]).flatten(0, 1)
        logp, _ = token_logprobs(hidden, model.head.weight, rows[:, 1:].flatten())
        (-logp.sum() / 35).backward()
        norm = distributed.clip_gradient(model, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm

def save(name, model, optimizer, **more):
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))      # leaves the embeddings gathered
    weights, moments = distributed.full_state(model, optimizer)
    if distributed.rank() == 0:
        torch.save(dict(weights=weights, moments=moments, **more), name)
    else:
        assert weights == moments == {}

def main():
    torch.manual_seed(distributed.rank())               # broadcast: all begin with rank 0's weights
    model = GPT(ModelConfig(51, 32, 2, 2, 1, 16, 33, 64, tied=sys.argv[1] == "1"))
    distributed.shard(distributed.broadcast(model))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0, fused=True)
    if sys.argv[2] == "save":
        assert distributed.full_state(model, optimizer)[1] == {}
        steps(model, optimizer, range(3))
        save("state.pt", model, optimizer)
        norm = steps(model, optimizer, range(3, 6))
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
        names = [name for name, _ in model.named_parameters()]
        iterated = dict(zip(names, distributed.full_tensors(model), strict=True))
        save("whole.pt", model, optimizer, norm=norm, iterated=iterated)
    else:
        state = dict(weights={}, moments={})            # rank 0 alone has read the file
        if distributed.rank() == 0:
            state = torch.load("state.pt", weights_only=True)
        distributed.load_full_state(model, optimizer, **state)
        norm = steps(model, optimizer, range(3, 6))
        save(f"load{distributed.size()}.pt", model, optimizer, norm=norm)

distributed.run(main)
"""


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 2), (1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(runs, before, after):
    """Catches states that hold slices, moments that go to other parameters, and ranks that stop
    after different steps. A scheduler's SIGTERM, sent to each rank and passed on by torchrun, stops
    the run after a step of all; then 2 processes go on exactly, 1 where 2 stopped, and 2 where 1
    did, to the weights of the undisturbed run."""
    name = f"from{before}to{after}"
    running = start(runs, [*RUN, "--tokens", "20000", "--name", name], before)
    folder = runs / f"out/{name}/state"
    while running.poll() is None and not [step for step, _ in saved(folder) if step > 1]:
        time.sleep(0.02)
    if before > 1:
        ranks = ["pgrep", "-P", str(running.pid)]
        for rank in subprocess.run(ranks, capture_output=True, text=True).stdout.split():
            os.kill(int(rank), signal.SIGTERM)
    running.send_signal(signal.SIGTERM)
    printed, wrong = running.communicate(timeout=PATIENCE)
    step = saved(folder)[0][0]
    assert f"stopped after step {step}" in printed and len(lines(runs, name)) == step, wrong
    printed, _ = finished(start(runs, ["train.py", "--resume", f"out/{name}"], after))
    assert "resume: from" in printed and f"step-{step:07d}" in printed
    assert [line["step"] for line in lines(runs, name)] == [
        line["step"] for line in lines(runs, "few1")
    ]
    assert farthest(runs, name, f"few{before}") < 1e-5
    assert before != after or farthest(runs, name, "few2") == 0
    moments = [load_state(saved(runs / f"out/few{n}/state")[0][1])["optimizer"] for n in (1, 2)]
    assert all(
        (moments[0][i][kind] - moments[1][i][kind]).abs().max() < 1e-4
        for i in moments[0]
        for kind in moments[0][i]
    )


# ---- going wrong ---------------------------------------------------------------------------------

BROKEN = """
import os, signal, sys, time
import train
from runtime import distributed
from runtime.flags import BadInput
how, real = sys.argv.pop(1), train.step
def step(*args):
    found = real(*args)
    number = found[2]["step"]
    if number == 2 and distributed.rank() == 1:
        if how == "raise":
            raise ValueError("the cat sat on the cable")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise BadInput("rank 1 has no disk")
    if number == 2 and how == "sleep":
        time.sleep(1000)
    return found
train.step = step
distributed.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill", "say", "sleep"])
def test_a_rank_that_fails_takes_the_others_down(runs, how):
    """Catches a hang, and an error buried under its consequences: a rank that raises, is killed, or
    has bad input ends the run, its error is printed, and those of other ranks (which lose the
    connection, or are asleep until torchrun kills them) are not. What was saved is there."""
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
    message = {
        "raise": "error: ValueError: the cat sat on the cable (train.py:",
        "kill": "error: rank 0 lost the connection to another process",
    }.get(how, "error: rank 1 has no disk")
    assert own.count("error: ") == own.count(message) == 1, wrong
    assert "Traceback" not in own and ("a fault of this code" in own) == (how == "raise"), wrong
    assert "SIGKILL" in wrong or how not in ("kill", "sleep"), wrong
    assert saved(runs / f"out/{name}/state")[0][0] >= 1


DIFFERENT = """
import os, sys, train
from runtime import distributed
if os.environ["RANK"] == "1":
    sys.argv += ["--lr", "0.5"]
distributed.run(train.main)
"""


@pytest.mark.slow
def test_settings_that_differ_are_refused(runs):
    """Catches two runs in one: a rank with another flag than the others ends the run before it has
    a folder."""
    script = write(runs, "different.py", DIFFERENT)
    _, wrong = finished(start(runs, [script, *RUN[1:], "--name", "different"], 2), code=1)
    says = "error: the processes of this run do not have the same settings: all machines need"
    assert wrong.count("error: ") == wrong.count(says) == 1, wrong
    assert not (runs / "out/different").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, words, says",
    [
        (
            3,
            RUN,
            "error: --prompts 16 does not divide into --minibatches 2 on each of 3 ranks: "
            "choose a multiple of 6",
        ),
        (
            2,
            [*RUN, "--prompts", "6"],
            "error: --prompts 6 does not divide into --minibatches 2 on each of 2 ranks: "
            "choose a multiple of 4",
        ),
        (2, ["tools/memory_table.py"], "error: this script runs without torchrun"),
        (2, ["train.py", "--group-size", "4,3"], "did you mean --group-sizes?"),
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
    monkeypatch.setattr(distributed, "gather_objects", lambda digest: [digest, digest[::-1]])
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


@pytest.mark.slow
def test_evaluation_is_shared(runs):
    """Catches questions evaluated twice or by nobody: eval.py on two processes prints and writes
    what one does, and every transcript is somewhere."""
    words = [
        "eval.py",
        "out/few1",
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
