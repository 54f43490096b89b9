"""README's answers to "How would I change ...": every diff is short, still applies to the code as
it is, runs, and does what it is said to do.

Each is applied to a copy of the scripts and trained there for a step or more. A change that leaves
the base what it is takes the base of the unchanged scripts (whose name, a hash of all code, would
be another: `shared`); the others make one of two steps, which is never right but goes through
everything. What a change computes is also checked on numbers, in the one module that it changes.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "README.md"
FILES = {  # the label of each answer -> the files that its diff changes
    "The reward": {"reward.py"},
    "The task": {"tasks.py", "pretrain.py"},
    "The guiding phrase": {"tokenizer.py"},
    "The advantage": {"mgrpo.py"},
    "The loss": {"mgrpo.py"},
    "The model": {"model.py", "kernels.py"},
    "Who gets a second look": {"mgrpo.py", "train.py", "compare.py"},
    "A third layer": {"mgrpo.py", "train.py", "pretrain.py"},
    "The learning rate": {"train.py"},
}
SMALL = (
    "--preset",
    "smoke",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--eval-questions",
    "4",
    "--name",
    "run",
)
# right in 40 % after seconds
EASY = (
    "--task",
    "chain",
    "--modulus",
    "3",
    "--base-tokens",
    "180000",
    "--prompts",
    "16",
    "--attempts",
    "2",
)
NEW = ("--base-tokens", "1", "--prompts", "4", "--tokens", "800")  # a base of two steps
# every row is trained, also of a base that is never right
ALL_ROWS = ("--kl-coef", "0.1", "--failed", "keep")


def answers():
    """README's section -> {label: (its text, its diff)}."""
    section = re.search(r"^## How would I change.*?(?=^## |\Z)", SOURCE.read_text(), re.M | re.S)
    assert section, f"{SOURCE} has no section 'How would I change ...'"
    found = re.findall(
        r"^\*\*([^*\n]+?)\.?\*\*((?:(?!^\*\*|^```)[\s\S])*)^```diff\n([\s\S]*?)^```",
        section[0],
        re.M,
    )
    assert len(found) == section[0].count("```diff"), (
        "a diff without a bold label before it, or two under one label"
    )
    return {label: (text, diff) for label, text, diff in found}


def changed_lines(diff):
    """The lines that a diff adds or takes away."""
    return [
        line
        for line in diff.splitlines()
        if line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- "))
    ]


def copy(folder):
    """The scripts, and what they read beside them, in a folder of their own -> it."""
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.html")]:
        shutil.copy(path, folder)
    return folder


def apply(label, folder, only=None):
    """Applies README's diff to the copy in `folder`, of a diff of several files to one of them if
    `only` names it -> the folder."""
    (folder / "change.diff").write_text(answers()[label][1])
    # git apply would skip files of a repository around it
    outside = os.environ | dict(GIT_CEILING_DIRECTORIES=str(folder.parent))
    words = ["git", "apply", *([f"--include={only}"] if only else []), "change.diff"]
    done = subprocess.run(words, cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"README's diff under '{label}' does not apply to the code any more; make it "
        f"anew.\n{done.stderr}"
    )
    assert {
        path.name
        for path in folder.glob("*.py")
        if path.read_text() != (ROOT / path.name).read_text()
    } == ({only} if only else FILES[label])
    return folder


def shared(folder, bases):
    """Lets the copy in `folder` take the base of `bases`, whatever code made it."""
    path = folder / "pretrain.py"
    path.write_text(
        path.read_text().replace(
            '\nif __name__ == "__main__":',
            '\nfingerprint = lambda config: "shared"\n\nif __name__ == "__main__":',
        )
    )
    if bases:
        (folder / "out").mkdir()
        shutil.copy(bases / "out/base-shared.pt", folder / "out")
    return folder


def run(folder, *words):
    """`python train.py` in the copy -> its lines of metrics.jsonl, and samples.md. On one thread:
    two wait for each other on a busy machine."""
    one = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, *words],
        cwd=folder,
        env=one,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [
        json.loads(line) for line in (folder / "out/run/metrics.jsonl").read_text().splitlines()
    ]
    return steps, (folder / "out/run/samples.md").read_text(errors="ignore")


def module(folder, name):
    """The changed module of a copy, beside the unchanged ones."""
    spec = importlib.util.spec_from_file_location(f"changed_{name}", folder / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The unchanged scripts, and one step of theirs: the folder with the base that others take, and
    that step's metrics."""
    folder = shared(copy(tmp_path_factory.mktemp("plain") / "copy"), None)
    steps, _ = run(folder, *EASY, "--tokens", "1000")
    assert steps[0]["signal1"] > 0 and 0 < steps[0]["accuracy1"] < 1
    return folder, steps[0]


@pytest.fixture
def change(tmp_path):
    """Applies a diff to a copy -> its folder."""
    return lambda label, only=None: apply(
        label, copy(tmp_path / ("whole" if only is None else "part")), only
    )


# ---- all of them ---------------------------------------------------------------------------------


def test_every_question_has_a_short_answer():
    """Catches a promised answer that is gone, one of more than ten lines, and a text that does not
    link the files that its diff changes."""
    found = answers()
    assert found.keys() == FILES.keys()
    for label, (text, diff) in found.items():
        assert 1 <= len(changed_lines(diff)) <= 10, label
        assert (
            set(re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M))
            == set(re.findall(r"^--- a/(\S+)$", diff, re.M))
            == FILES[label]
        ), label
        assert all(f"[{name}]({name})" in text for name in FILES[label]), label
        assert max(map(len, changed_lines(diff))) <= 141, label


# ---- one by one ----------------------------------------------------------------------------------


def test_the_reward(change, plain):
    """Catches a bonus that reaches wrong answers, that counts as accuracy, or that training never
    sees: the same first rollout as without it, so the same accuracy; rewards a little lower; groups
    that were all right now have something to learn."""
    folder = change("The reward")
    score = module(folder, "reward").score
    short, long = (score(f"<think>{'1' * n}</think><answer>7</answer>", "7") for n in (9, 400))
    assert (short.accuracy, long.accuracy) == (1, 1) and 0.5 < long.total < short.total <= 1
    assert score("<answer>8</answer>", "7").total == score("", "7").total == 0
    (step, *_), _ = run(shared(folder, plain[0]), *EASY, "--tokens", "1000")
    assert [step[name] for name in ("accuracy1", "accuracy2", "length1")] == [
        plain[1][name] for name in ("accuracy1", "accuracy2", "length1")
    ]
    assert (
        0.9 * step["accuracy1"] <= step["reward1"] < step["accuracy1"]
        and 0.9 * step["accuracy2"] <= step["reward2"] < step["accuracy2"]
    )
    assert step["signal1"] + step["signal2"] > plain[1]["signal1"] + plain[1]["signal2"]


def test_the_task(change, encoding):
    """Catches a polynomial worked out wrongly (another way of computing it is the oracle), texts
    longer than the model's context is planned for, and a task that no flag chooses."""
    import random

    from reward import is_correct
    from tasks.catalog import token_limits

    folder = change("The task")
    tasks = module(folder, "tasks")
    task, rng = tasks.make_task("horner", modulus=11), random.Random(0)
    question_limit, limit = token_limits(task)
    right = 0
    for index in range(300):
        problem = tasks.draw(task, "train", 0, index)
        a, b, c, x, p = map(
            int,
            re.fullmatch(
                r"(\d+)xx\+(\d+)x\+(\d+), x = (\d+) \(mod (\d+)\)", problem.question
            ).groups(),
        )
        assert p == 11 and problem.gold == str((a * x * x + b * x + c) % 11)
        attempt = task.attempt(problem, rng)
        right += is_correct(attempt.text, problem.gold)
        assert len(encoding.encode_ordinary(problem.question)) < question_limit
        assert (
            max(
                len(encoding.encode_ordinary(text))
                for text in (attempt.text, task.review(problem, attempt, rng))
            )
            < limit
        )
    assert 150 < right < 300  # a slip in 8 % of four steps
    _, samples = run(folder, *NEW, "--task", "horner", "--operations", "4")
    assert re.search(r"^\d+xx\+\d+x\+\d+, x = \d+ \(mod 5\)$", samples, re.M)


def test_the_guiding_phrase(change):
    """Catches a phrase that is not a token of its own, or that never reaches a second look."""
    folder = change("The guiding phrase")
    from huggingface import tokenizer

    changed = module(folder, "tokenizer")
    (phrase,), (old,) = (
        set(changed.PHRASES) - set(tokenizer.PHRASES),
        set(tokenizer.PHRASES) - set(changed.PHRASES),
    )
    assert len(changed.build_encoding().encode_ordinary(phrase)) == 1
    _, samples = run(folder, *NEW, "--attempts", "12", "--corrections", "2", "--tokens", "4000")
    assert re.search(rf"^\W*{re.escape(phrase)}$", samples, re.M) and not re.search(
        rf"^\W*{re.escape(old)}$", samples, re.M
    )


def test_the_advantage(change, plain):
    """Catches anything but R_i minus the mean of the others, a group of one included; and a loop
    that still sees the old ones: from the same rollout, another loss."""
    folder = change("The advantage")
    rewards, groups = (
        torch.tensor([1.0, 0, 0, 0.5, 1, 1, 0.25]),
        torch.tensor([0, 0, 0, 0, 1, 1, 2]),
    )
    expected = torch.tensor([1 - 0.5 / 3, -1.5 / 3, -1.5 / 3, 0.5 - 1 / 3, 0, 0, 0])
    torch.testing.assert_close(module(folder, "mgrpo").group_advantages(rewards, groups), expected)
    (step, *_), _ = run(shared(folder, plain[0]), *EASY, "--tokens", "1000")
    assert (
        step["accuracy1"] == plain[1]["accuracy1"] and abs(step["loss"] - plain[1]["loss"]) > 1e-4
    )


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_the_loss(change, plain, normalize):
    """Catches pads in the mean, a ratio that is not of the whole row, and a clip that does not take
    the row as one: value and gradient are those of GSPO's equation (5) written out, row by row."""
    folder = change("The loss")
    policy_loss, generator = module(folder, "mgrpo").policy_loss, torch.Generator().manual_seed(0)
    old, lengths, advantages = (
        -torch.rand(4, 6, generator=generator),
        torch.tensor([6, 1, 4, 3]),
        torch.tensor([1.0, -0.5, 2.0, -1.0]),
    )
    logp = (old + 0.1 * torch.randn(4, 6, generator=generator)).requires_grad_()
    mask = torch.arange(6) < lengths[:, None]
    loss, sums = policy_loss(
        logp, old, advantages, mask, clip_low=0.03, clip_high=0.03, normalize=normalize
    )
    (found,) = torch.autograd.grad(loss, logp)
    terms, clipped = [], 0
    for row, (n, A) in enumerate(zip(lengths.tolist(), advantages)):
        s = ((logp - old)[row, :n].sum() / n).exp()
        terms.append(
            torch.min(s * A, s.clamp(0.97, 1.03) * A) * (1 if normalize == "sequence" else n)
        )
        clipped += n * bool((A > 0 and s > 1.03) or (A < 0 and s < 0.97))
    expected = -sum(terms) / (4 if normalize == "sequence" else int(lengths.sum()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logp)[0])
    assert int(sums["clipped"]) == clipped > 0
    if normalize == "sequence":
        (step, *_), _ = run(
            shared(folder, plain[0]),
            *EASY,
            "--tokens",
            "1000",
            "--clip-low",
            "0.001",
            "--clip-high",
            "0.001",
        )
        assert (
            step["updates"] == 2
            and step["accuracy1"] == plain[1]["accuracy1"]
            and step["clipped"] > plain[1]["clipped"]
        )


def test_the_model(change, plain):
    """Catches the trainer changed and the sampler not: with the whole diff the gauge is as small as
    ever, with model.py's part alone it is not."""
    (step, *_), _ = run(change("The model"), *NEW, *ALL_ROWS)
    assert 0 < step["gauge_max"] < 1e-4
    (step, *_), _ = run(
        shared(change("The model", "model.py"), plain[0]), *EASY, *ALL_ROWS, "--tokens", "1000"
    )
    assert step["gauge_max"] > 1e-3


def test_the_models_kernel(change):
    """Catches a Triton kernel that computes something else than its twin in torch, or either that
    is not the gate of model.py."""
    pytest.importorskip("triton")
    kernels = module(change("The model"), "kernels")
    gate_up = 3 * torch.randn(3, 74, generator=torch.Generator().manual_seed(0))
    if torch.cuda.is_available():
        gate_up = gate_up.cuda()
    gate, up = gate_up.chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(kernels.swiglu_torch(gate_up), expected)
    torch.testing.assert_close(kernels.swiglu(gate_up), expected, atol=1e-5, rtol=1e-4)


def test_who_gets_a_second_look(change, plain):
    """Catches attempts that go on from questions which are all right or all wrong; a flag or an arm
    of compare.py that is not there."""
    folder = change("Who gets a second look")
    right, questions = (
        torch.tensor([1, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool),
        torch.tensor([0, 0, 1, 1, 2, 2, 4, 4]),
    )
    choose = module(folder, "mgrpo").choose_sources
    assert choose(right, questions, "mixed").tolist() == [2, 3, 6, 7]
    assert choose(right, questions, "wrong").tolist() == [2, 4, 5, 7]
    assert module(folder, "compare").ARMS["mixed"] == "--sources mixed"
    (step, *_), _ = run(shared(folder, plain[0]), *EASY, "--tokens", "1000", "--sources", "mixed")
    assert step["accuracy1"] == plain[1]["accuracy1"] and step["signal1"] == plain[1]["signal1"]
    # fewer corrections
    assert plain[1]["generated"] / 4 < step["generated"] < plain[1]["generated"]


def test_a_third_layer(change):
    """Catches a third layer that is grown but not trained, or that does not fit the context: every
    row is trained here, and the tokens that went through training are those of three layers, whose
    own tokens were generated once."""
    (step, *_), _ = run(
        change("A third layer"), *NEW, *ALL_ROWS, "--attempts", "2", "--corrections", "2"
    )
    assert step["length3"] > 0 and step["reward3"] == 0 and step["updates"] == 2
    generated = [step[f"length{i}"] * 4 * 2**i for i in (1, 2, 3)]
    assert (
        step["generated"] == pytest.approx(sum(generated), abs=1)
        and step["packed"] * (1 - step["padding"]) > 0.9 * step["generated"]
    )
    assert 0 < step["gauge_max"] < 1e-4


def test_the_learning_rate(change, plain):
    """Catches a schedule that is not half a cosine of the tokens generated so far."""
    steps, _ = run(
        shared(change("The learning rate"), plain[0]), *EASY, "--tokens", "6000", "--lr", "0.0003"
    )
    before = [0] + [step["generated"] for step in steps]
    assert len(steps) >= 3 and steps[0]["lr"] == pytest.approx(0.0003)
    assert [step["lr"] for step in steps] == pytest.approx(
        [0.00015 * (1 + math.cos(math.pi * n / 6000)) for n in before[:-1]], rel=1e-4
    )
