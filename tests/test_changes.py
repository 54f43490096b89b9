"""The recipes of docs/: every diff is short, applies to the code as it is, runs, and does what its
page says.

Each is applied to a copy of the code. What it computes is checked on numbers, in the one module
that it changes; then the copy trains for a step or more. A change that leaves the base what it is
takes the base of the unchanged code. The others make one of two steps, which is never right but
goes through everything.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, ROOT

from mgrpo import PHRASES

PAGES = [ROOT / "docs" / name for name in ("recipes.md", "more-recipes.md", "a-method.md")]
ROOMS = ("engine", "verifier", "tasks", "huggingface", "variants", "runtime", "report", "tools")
FILES = {  # the label of each answer -> the files that its diff changes
    "The reward": {"reward.py"},
    "The advantage": {"mgrpo.py"},
    "The loss": {"mgrpo.py"},
    "The task": {"tasks/catalog.py", "tasks/chain.py"},
    "The guiding phrase": {"mgrpo.py"},
    "The learning rate": {"train.py"},
    "Who goes on": {"mgrpo.py", "tools/compare.py"},
    "A method of your own": {"variants/signs.py", "variants/table.py"},
    "The model": {"model.py", "engine/kernels.py"},
}
SMALL = (
    *("--preset", "smoke", "--device", "cpu", "--dtype", "float32"),
    *("--eval-questions", "4", "--name", "run"),
)
# Right in 40 % after seconds.
EASY = (
    *("--task", "chain", "--modulus", "3", "--base-tokens", "180000"),
    *("--prompts", "16", "--group-sizes", "2,3", "--method-args", "siblings=parent"),
)
NEW = ("--base-tokens", "1", "--prompts", "4", "--tokens", "800")  # a base of two steps
# Every row is trained, also of a base that is never right.
ALL_ROWS = ("--kl-coef", "0.1", "--method-args", "failed=keep")


def answers():
    """The pages -> {label: (its text, its diff)}."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    answer = r"^\*\*([^*\n]+?)\.?\*\*((?:(?!^\*\*|^```)[\s\S])*)^```diff\n([\s\S]*?)^```"
    found = re.findall(answer, pages, re.M)
    assert len(found) == pages.count("```diff"), (
        "a diff without a bold label before it, or two under one label"
    )
    return {label: (text, diff) for label, text, diff in found}


def changed_lines(diff):
    """The lines that a diff adds or takes away."""
    marks, heads = ("+", "-"), ("+++ ", "--- ")
    lines = diff.splitlines()
    return [line for line in lines if line.startswith(marks) and not line.startswith(heads)]


def copy(folder):
    """The code in a folder of its own -> it."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, folder / room, ignore=ignored)
    return folder


def apply(label, folder, only=None):
    """Applies a diff to the copy in `folder`, of a diff of several files to one of them if `only`
    names it -> the folder."""
    (folder / "change.diff").write_text(answers()[label][1], encoding="utf-8")
    # git apply would skip files of a repository around it
    outside = os.environ | dict(GIT_CEILING_DIRECTORIES=str(folder.parent))
    words = ["git", "apply", *([f"--include={only}"] if only else []), "change.diff"]
    done = subprocess.run(words, cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"the diff under '{label}' does not apply to the code any more; make it anew\n{done.stderr}"
    )
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    before = lambda name: (ROOT / name).read_text() if (ROOT / name).exists() else None
    changed = {name for name in names if (folder / name).read_text() != before(name)}
    assert changed == ({only} if only else FILES[label])
    return folder


def python(folder, *words):
    """Runs Python in a copy -> what it printed. On one thread: two wait for each other on a busy
    machine."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(folder))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(folder, *words, base=None):
    """`python train.py` in a copy -> the lines of metrics.jsonl and of rollouts.jsonl, as dicts.
    base: folder of another copy, whose base is taken."""
    if base:
        shutil.copytree(base / "out", folder / "out", ignore=shutil.ignore_patterns("run"))
    bases = set(folder.glob("out/base-*.pt"))
    python(folder, "train.py", *SMALL, *words)
    assert not base or set(folder.glob("out/base-*.pt")) == bases, "the change makes another base"
    return [
        [json.loads(line) for line in (folder / "out/run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "rollouts.jsonl")
    ]


def module(folder, name):
    """A changed module of a copy, beside the unchanged ones."""
    spec = importlib.util.spec_from_file_location(
        "changed_" + name.replace("/", "_"), folder / name
    )
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The unchanged code, and one step of it: the folder with the base that others take, and that
    step's metrics."""
    folder = copy(tmp_path_factory.mktemp("plain") / "copy")
    (step, *_), _ = run(folder, *EASY, "--tokens", "1000")
    assert step["signal1"] > 0 and 0 < step["accuracy1"] < 1
    return folder, step


@pytest.fixture
def change(tmp_path):
    """Applies a diff to a copy -> its folder."""
    return lambda label, only=None: apply(
        label, copy(tmp_path / ("whole" if only is None else "part")), only
    )


# ---- all of them ---------------------------------------------------------------------------------


def test_every_recipe_is_short_and_links_its_files():
    """Catches a recipe that is gone or has grown, and a text that does not link the files that its
    diff changes."""
    found = answers()
    assert found.keys() == FILES.keys()
    for label, (text, diff) in found.items():
        assert 1 <= len(changed_lines(diff)) <= 16, label
        for mark in ("+++ b", "--- a"):  # a new file has no line of the second kind
            names = re.findall(rf"^{re.escape(mark)}/(\S+)$", diff, re.M)
            there = {name for name in FILES[label] if mark == "+++ b" or (ROOT / name).exists()}
            assert set(names) == there, label
        assert all(f"[{name}](../{name})" in text for name in there), label
        assert max(map(len, changed_lines(diff))) <= 101, label  # code at 100 columns, and a mark


@pytest.mark.parametrize("label", FILES)
def test_every_diff_applies(label, change):
    change(label)


# ---- one by one ----------------------------------------------------------------------------------


def test_a_shorter_right_answer_is_worth_more(change):
    """Catches a bonus that reaches wrong answers, or that counts as accuracy."""
    score = module(change("The reward"), "reward.py").score
    short, long = (score(f"<think>{'1' * n}</think><answer>7</answer>", "7") for n in (9, 400))
    assert (short.accuracy, long.accuracy) == (1, 1) and 0.5 < long.total < short.total <= 1
    assert score("<answer>8</answer>", "7").total == score("", "7").total == 0


@pytest.mark.slow
def test_training_sees_the_reward(change, plain):
    """Catches a bonus that training never sees: the same first rollout as without it, so the same
    accuracy; rewards a little lower; groups that were all right now have something to learn."""
    base, before = plain
    (step, *_), _ = run(change("The reward"), *EASY, "--tokens", "1000", base=base)
    for name in ("accuracy1", "accuracy2", "length1"):
        assert step[name] == before[name]
    for k in (1, 2):
        assert 0.9 * step[f"accuracy{k}"] <= step[f"reward{k}"] < step[f"accuracy{k}"]
    assert step["signal1"] + step["signal2"] > before["signal1"] + before["signal2"]


def test_the_advantage_is_the_reward_minus_the_mean_of_the_others(change):
    rewards = torch.tensor([1.0, 0, 0, 0.5, 1, 1, 0.25])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    expected = torch.tensor([1 - 0.5 / 3, -1.5 / 3, -1.5 / 3, 0.5 - 1 / 3, 0, 0, 0])
    group_advantages = module(change("The advantage"), "mgrpo.py").group_advantages
    torch.testing.assert_close(group_advantages(rewards, groups), expected)


@pytest.mark.slow
def test_training_sees_the_advantage(change, plain):
    """Catches a loop that still sees the old ones: from the same rollout, another loss."""
    base, before = plain
    (step, *_), _ = run(change("The advantage"), *EASY, "--tokens", "1000", base=base)
    assert step["accuracy1"] == before["accuracy1"]
    assert abs(step["loss"] - before["loss"]) > 1e-4


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_the_loss_is_that_of_gspo(change, normalize):
    """Catches pads in the mean, a ratio that is not of the whole row, and a clip that does not take
    the row as one: value and gradient are those of GSPO's equation (5) written out, row by row."""
    policy_loss = module(change("The loss"), "mgrpo.py").policy_loss
    generator = torch.Generator().manual_seed(0)
    old, lengths = -torch.rand(4, 6, generator=generator), torch.tensor([6, 1, 4, 3])
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0])
    logp = (old + 0.1 * torch.randn(4, 6, generator=generator)).requires_grad_()
    mask = torch.arange(6) < lengths[:, None]
    loss, sums = policy_loss(
        logp, old, advantages, mask, clip_low=0.03, clip_high=0.03, normalize=normalize
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    terms, clipped = [], 0
    for row, (n, A) in enumerate(zip(lengths.tolist(), advantages)):
        s = ((logp - old)[row, :n].sum() / n).exp()
        weight = 1 if normalize == "sequence" else n
        terms.append(torch.min(s * A, s.clamp(0.97, 1.03) * A) * weight)
        clipped += n * bool((A > 0 and s > 1.03) or (A < 0 and s < 0.97))
    expected = -sum(terms) / (4 if normalize == "sequence" else int(lengths.sum()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logp)[0])
    assert int(sums["clipped"]) == clipped > 0


@pytest.mark.slow
def test_training_sees_the_loss(change, plain):
    """Catches a ratio that the loop does not clip: nearer to 1, so the range is smaller."""
    base, before = plain
    words = (*EASY, "--tokens", "1000", "--clip", "0.001")
    (step, *_), _ = run(change("The loss"), *words, base=base)
    assert step["updates"] == 2 and step["accuracy1"] == before["accuracy1"]
    assert step["clipped"] > before["clipped"]


HORNER = """
import json, random
from reward import is_correct
from tasks.catalog import TaskConfig, make_task
from tasks.problems import draw

task, rng = make_task(TaskConfig("horner", modulus=11)), random.Random(0)
tokens = lambda text: len(task.encoding.encode_ordinary(text))
for index in range(300):
    problem = draw(task.puzzle, "train", "0", index)
    attempt = task.puzzle.attempt(problem, rng)
    assert len(task.prompt_ids(problem)) <= task.prompt_tokens
    assert tokens(attempt.text) < task.max_new_tokens
    assert tokens(task.puzzle.review(problem, [attempt], rng).text) < task.max_new_tokens
    right = is_correct(attempt.text, problem.gold)
    print(json.dumps([problem.question, problem.gold, right]))
"""


@pytest.mark.slow
def test_the_task_asks_for_polynomials(change):
    """Catches a polynomial worked out wrongly (another way of computing it is the oracle), texts
    longer than the model's context is planned for, and a task that no flag chooses."""
    folder = change("The task")
    problems = [json.loads(line) for line in python(folder, "-c", HORNER).splitlines()]
    form = r"(\d+)xx\+(\d+)x\+(\d+), x = (\d+) \(mod (\d+)\)"
    for question, gold, _ in problems:
        a, b, c, x, p = map(int, re.fullmatch(form, question).groups())
        assert p == 11 and gold == str((a * x * x + b * x + c) % 11)
    assert 150 < sum(right for *_, right in problems) < 300  # a slip in 8 % of four steps
    _, trees = run(folder, *NEW, "--task", "horner", "--operations", "4")
    assert trees and all(re.fullmatch(form, tree["question"]) for tree in trees)


@pytest.mark.slow
def test_the_guiding_phrase_reaches_the_corrections(change):
    """Catches a phrase that is not a token of its own, or that no correction gets."""
    folder = change("The guiding phrase")
    changed = module(folder, "mgrpo.py").PHRASES
    (phrase,), (old,) = set(changed) - set(PHRASES), set(PHRASES) - set(changed)
    code = "from tasks.tokenizer import build_encoding; import sys; "
    code += "print(len(build_encoding().encode_ordinary(sys.argv[1])))"
    assert python(folder, "-c", code, phrase) == "1\n"
    _, trees = run(folder, *NEW, "--group-sizes", "12,2", "--tokens", "4000")
    corrections = [
        node for tree in trees for answer in tree["answers"] for node in answer["answers"]
    ]
    phrases = {node["phrase"] for node in corrections}
    assert phrase in phrases and old not in phrases


@pytest.mark.slow
def test_the_sampler_and_the_trainer_have_one_gate(change):
    """Catches the trainer changed and the sampler not: with the whole diff the gauge is as small as
    ever, with model.py's part alone it is not."""
    (step, *_), _ = run(change("The model"), *NEW, *ALL_ROWS)
    assert 0 < step["gauge_max"] < 1e-4
    (step, *_), _ = run(change("The model", "model.py"), *NEW, *ALL_ROWS)
    assert step["gauge_max"] > 1e-3


def test_the_kernel_of_the_gate_is_its_twin(change):
    """Catches a Triton kernel that computes something else than its twin in torch, or either that
    is not the gate of model.py."""
    pytest.importorskip("triton")
    kernels = module(change("The model"), "engine/kernels.py")
    gate_up = 3 * torch.randn(3, 74, generator=torch.Generator().manual_seed(0))
    if torch.cuda.is_available():
        gate_up = gate_up.cuda()
    gate, up = gate_up.chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(kernels.swiglu_torch(gate_up), expected)
    torch.testing.assert_close(kernels.swiglu(gate_up), expected, atol=1e-5, rtol=1e-4)


def test_mixed_questions_are_chosen(change):
    """Catches answers that go on from questions which are all right or all wrong; an arm of
    tools/compare.py that is not there."""
    folder = change("Who goes on")
    right = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
    questions = torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])
    choose = module(folder, "mgrpo.py").choose_sources
    layer = SimpleNamespace(correct=right, questions=questions)
    assert choose(layer, "mixed").tolist() == [2, 3, 6, 7]
    assert choose(layer, "wrong").tolist() == [2, 4, 5, 7]
    arm = module(folder, "tools/compare.py").ARMS["mixed"]
    assert arm == "--method-args siblings=parent,sources=mixed"


@pytest.mark.slow
def test_a_method_of_ones_own_trains(change, plain):
    """Catches a recipe that names a function which no step calls: a run with the new method has the
    same rollout, and another gradient."""
    base, before = plain
    words = (*EASY[:-2], "--method", "signs", "--method-args", "siblings=parent,size=2")
    (step, *_), _ = run(change("A method of your own"), *words, "--tokens", "1000", base=base)
    assert step["accuracy1"] == before["accuracy1"] and step["signal1"] == before["signal1"]
    assert step["grad_norm"] > 1.2 * before["grad_norm"]


@pytest.mark.slow
def test_mixed_questions_alone_are_corrected(change, plain):
    base, before = plain
    words = (*EASY[:-1], "siblings=parent,sources=mixed", "--tokens", "1000")
    (step, *_), _ = run(change("Who goes on"), *words, base=base)
    assert step["accuracy1"] == before["accuracy1"] and step["signal1"] == before["signal1"]
    # fewer corrections
    assert before["generated"] / 4 < step["generated"] < before["generated"]


@pytest.mark.slow
def test_the_learning_rate_is_half_a_cosine_of_the_tokens(change, plain):
    words = (*EASY, "--tokens", "6000", "--lr", "0.0003")
    steps, _ = run(change("The learning rate"), *words, base=plain[0])
    before = [0] + [step["generated"] for step in steps]
    assert len(steps) >= 3 and steps[0]["lr"] == pytest.approx(0.0003)
    expected = [0.00015 * (1 + math.cos(math.pi * n / 6000)) for n in before[:-1]]
    assert [step["lr"] for step in steps] == pytest.approx(expected, rel=1e-4)
