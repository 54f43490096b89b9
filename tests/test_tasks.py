"""The built-in tasks: problems, the held-out split, the texts of a base model, and the tokenizer."""

import collections
import contextlib
import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch

from engine import threads
from engine.packing import pad_rows, padded_logprobs
from mgrpo import PHRASES, longest_phrase, phrase_text
from model import GPT, ModelConfig
from reward import extract_answer, is_correct, score
from runtime.checkpoints import save_checkpoint
from runtime.flags import BadInput
from tasks import base, problems
from tasks.catalog import TASKS, TaskConfig, make_puzzle, make_task
from tasks.problems import dialogue, draw, prompt_text
from tasks.tokenizer import TAGS, WORDS, build_encoding


def puzzle_of(name, **difficulty):
    return make_puzzle(TaskConfig(name, **difficulty))


# ---- the Task interface --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_streams_are_pure_functions(name):
    """Catches shared random state: problem 5 must be the same whatever was drawn before, and differ
    between seeds, splits and indices."""
    puzzle = puzzle_of(name)
    assert draw(puzzle, "train", 1, 5) == draw(puzzle, "train", 1, 5)
    questions = {
        draw(puzzle, split, seed, i).question
        for split in ("train", "held out")
        for seed in (0, 1)
        for i in (5, 6)
    }
    assert len(questions) == 8


def test_a_step_draws_the_next_part_of_its_stream():
    """Catches steps that overlap, a step that depends on its size in another way than by where the
    stream stands, and the stream of another seed or of the base: results would change."""
    task = make_task(TaskConfig())
    stream = [draw(task.puzzle, "train", "rl/7", i) for i in range(12)]
    assert [task.train_problems(7, step, 4) for step in range(3)] == [
        stream[0:4],
        stream[4:8],
        stream[8:12],
    ]
    assert task.train_problems(7, 1, 6) == stream[6:12] != task.train_problems(8, 1, 6)


def test_held_out_problems_differ_and_stay_the_same(capsys):
    """Catches a question asked twice, a part that changes between calls, and a puzzle with few
    questions that never returns."""
    task = make_task(TaskConfig())
    asked = task.held_out(300)
    assert asked == task.held_out(300) == task.held_out()[:300]
    assert len({task.canonical(problem) for problem in asked}) == len(asked) == 300
    assert asked != task.held_out(300, seed=1) and len(task.held_out()) == 1024
    few = len(make_task(TaskConfig("countdown", numbers=2)).held_out(100))
    assert 5 <= few < 100
    assert f"{few} different questions are asked, not 100" in capsys.readouterr().out


def test_prompts_and_completions_fit_their_bounds():
    """Catches a bound that truncates right answers or overflows the context of a base: the longest
    of 500 prompts, and of the texts that a base learns from."""
    for task in (
        make_task(
            TaskConfig(name, operations=operations, modulus=97, candidates=9, numbers=numbers)
        )
        for name in TASKS
        for operations, numbers in ((2, 2), (12, 6))
    ):
        encode, rng = task.encoding.encode_ordinary, random.Random(0)
        drawn = [draw(task.puzzle, "train", 0, i) for i in range(500)]
        texts = [turn.text for problem in drawn for turn in dialogue(task.puzzle, problem, rng)]
        assert max(len(task.prompt_ids(p)) for p in drawn) <= task.prompt_tokens
        assert max(len(encode(text)) + 1 for text in texts) <= task.max_new_tokens / 1.5
        row = task.prompt_tokens + task.puzzle.looks * task.max_new_tokens
        row += (task.puzzle.looks - 1) * longest_phrase(task.encoding)
        assert row <= base.base_shape(task, base.BaseConfig()).context


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("solve", dict(candidates=0)),
        ("solve", dict(candidates=12)),
        ("solve", dict(operations=1)),
        ("chain", dict(modulus=2)),
        ("solve", dict(modulus=98)),
        ("countdown", dict(numbers=9)),
        ("solve", dict(looks=1)),
        ("chain", dict(looks=9)),
        ("solve", dict(reviewer="strict")),
        ("solve", dict(habit=1.5)),
    ],
)
def test_difficulty_out_of_range_is_refused(name, wrong):
    """Catches a task that can draw nothing, or hangs."""
    with pytest.raises(BadInput, match=f"--{next(iter(wrong))} "):
        make_task(TaskConfig(name, **wrong))


def test_longer_completions_than_the_context_holds_are_refused():
    """Catches rows that run out of positions in layer 2."""
    longest = make_task(TaskConfig()).max_new_tokens
    assert make_task(TaskConfig(), 5).max_new_tokens == 5
    with pytest.raises(BadInput, match=f"at most {longest}"):
        make_task(TaskConfig(), longest + 1)


# ---- the held-out split --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_computation_is_met_in_training(name):
    """Catches evaluation on what training can work through in other words, another order or for
    other candidates: none of 20,000 training-side draws has a computation of the held-out
    questions, told apart here by other means than in problems.py."""

    def functions(operations):
        return tuple(
            tuple(problems.apply(op, x, b) % 11 for x in range(11)) for op, b in operations
        )

    worked = dict(
        # an attempt may try any candidate
        solve=lambda problem: {(x, functions(problem.data[1])) for x in problem.data[0]},
        chain=lambda problem: {(problem.data[0], functions(problem.data[1]))},
        # and reach any target
        countdown=lambda problem: {problem.gold.numbers},
    )[name]
    task = make_task(TaskConfig(name))
    asked = task.held_out(500 if name == "countdown" else 1024)
    met = set()
    for i in range(20_000):
        met |= worked(draw(task.puzzle, "train", "base/0", i))
    assert [problem.question for problem in asked if worked(problem) & met] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, difficulty",
    [
        ("solve", {}),
        ("chain", {}),
        ("countdown", {}),
        ("solve", dict(candidates=2, operations=2, modulus=5)),
    ],
)
def test_both_sides_of_the_split_are_alike(name, difficulty):
    """Catches a split by which one side is harder, or has other answers: shares of lengths, answers
    and operations. (Two samples of 8,000 of one distribution differ by less than 0.02 in each;
    countdown's 70 held-out sets of numbers are few.)"""
    puzzle = puzzle_of(name, **difficulty)
    sides = [[draw(puzzle, split, 0, i) for i in range(8000)] for split in ("train", "held out")]
    if name == "countdown":
        views = dict(target=lambda p: [p.gold.target])
    else:
        views = dict(
            length=lambda p: [len(p.data[1])],
            answer=lambda p: [p.gold.split()[-1]],
            operation=lambda p: [op for op, _ in p.data[1]],
            first=lambda p: [p.data[0] if name == "chain" else len(p.data[0])],
        )
    for what, view in views.items():
        one, other = (collections.Counter(x for p in side for x in view(p)) for side in sides)
        apart = sum(
            abs(one[x] / one.total() - other[x] / other.total()) for x in one.keys() | other.keys()
        )
        assert apart / 2 < (0.1 if name == "countdown" else 0.05), (what, apart)


def test_every_small_task_has_two_sides():
    """Catches a task within its ranges that has nothing to train on, or nothing to ask."""
    for puzzle in [
        *(
            puzzle_of(name, candidates=1, operations=2, modulus=modulus)
            for name in ("solve", "chain")
            for modulus in range(3, 14)
        ),
        *(puzzle_of("countdown", numbers=numbers) for numbers in range(2, 7)),
    ]:
        for split in ("train", "held out"):
            problem = draw(puzzle, split, 0, 0)
            assert problems.is_held_out(puzzle, problem) == (split == "held out")


# ---- texts of a base model -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_an_attempt_verifies_where_it_reached_the_target(name):
    """Catches a gold answer, an attempt and a verifier that disagree, and texts out of format."""
    puzzle, rng = puzzle_of(name), random.Random(0)
    targets = dict(
        solve=lambda p: p.data[2], chain=lambda p: int(p.gold), countdown=lambda p: p.gold.target
    )
    for i in range(400):
        problem = draw(puzzle, "train", 2, i)
        attempt = puzzle.attempt(problem, rng)
        right = attempt.reached == targets[name](problem)
        assert is_correct(attempt.text, problem.gold) == right
        for turn in (attempt, *dialogue(puzzle, problem, rng)):
            assert score(turn.text, problem.gold).format == 1
            reached = turn.reached == targets[name](problem)
            assert is_correct(turn.text, problem.gold) == reached


def test_solve_has_exactly_one_solution():
    """Catches two candidates that reach the target: the gold list would then be one of several
    right ones."""
    for modulus in (11, 12, 23):
        puzzle = puzzle_of("solve", modulus=modulus, candidates=5)
        for i in range(300):
            candidates, operations, target = draw(puzzle, "train", 0, i).data
            ends = [problems.compute(x, operations, modulus)[-1] for x in candidates]
            assert ends.count(target) == 1


@pytest.mark.parametrize("name", ["solve", "countdown"])
@pytest.mark.parametrize("reviewer", problems.REVIEWERS)
def test_reviews_err_as_stated(name, reviewer):
    """Catches reviews that reveal the truth, hold no seed of it, or follow another cue than the
    last operation of the answer before: P(no | right) and P(no | wrong) by that operation, in every
    turn, within 4.5 standard errors."""
    puzzle, rng = puzzle_of(name, reviewer=reviewer), random.Random(0)
    said = collections.defaultdict(list)
    for i in range(2500):
        problem = draw(puzzle, "train", 0, i)
        turns = dialogue(puzzle, problem, rng)
        for before, review in itertools.pairwise(turns):
            operation = problem.data[1][-1][0] if name == "solve" else before.choice
            right = is_correct(before.text, problem.gold)
            said[operation, right].append(": no. " in review.text)
    assert len(said) == 6
    for (operation, right), verdicts in said.items():
        p, n = problems.REVIEWERS[reviewer][operation][0 if right else 1], len(verdicts)
        assert abs(sum(verdicts) / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5, (operation, right)


def test_a_review_knows_all_answers_before_it():
    """Catches a review that compares another answer than the last, repeats it after "no", tries a
    candidate twice while one is left, or confirms another answer than the last."""
    puzzle, rng, tries = puzzle_of("solve", looks=5), random.Random(1), 0
    for i in range(400):
        problem = draw(puzzle, "train", 3, i)
        candidates, _, target = problem.data
        turns = dialogue(puzzle, problem, rng)
        for k in range(1, 5):
            last, turn, tried = turns[k - 1], turns[k], [t.choice for t in turns[:k]]
            difference = (target - last.reached) % 11
            assert turn.text.startswith(f"<think>off by {target}-{last.reached}={difference}: ")
            if ": yes" in turn.text:
                assert extract_answer(turn.text) == extract_answer(last.text)
                assert (turn.choice, turn.reached) == (last.choice, last.reached)
            elif len(set(tried)) < len(candidates):
                assert turn.choice not in tried
                tries += 1
            else:
                assert turn.choice != last.choice or len(candidates) == 1
    assert tries > 500


def test_first_answers_check_themselves_at_the_rate_of_the_habit():
    """Catches a habit that is not there, at another rate, or in later answers too; and one that
    compares without acting on it."""
    for habit in (0.0, 0.3):
        puzzle, rng = puzzle_of("solve", habit=habit), random.Random(2)
        drawn = [draw(puzzle, "train", 0, i) for i in range(2000)]
        turns = [dialogue(puzzle, problem, rng) for problem in drawn]
        checked = ["off by" in first.text for first, *_ in turns]
        assert abs(sum(checked) / 2000 - habit) <= 4.5 * (habit * (1 - habit) / 2000) ** 0.5
        assert all(turn.text.count("off by") == 1 for _, *later in turns for turn in later)
        for problem, (first, *_), check in zip(drawn, turns, checked):
            assert is_correct(first.text, problem.gold) == (first.reached == problem.data[2])
            assert not check or (": no. " in first.text) == (
                first.text.count("=") > len(problem.data[1]) + 1
            )


def test_dialogues_of_countdown_begin_right_half_of_the_time():
    """Catches a base that never reads "yes": one attempt in six is right, but of those that begin a
    dialogue 0.5 + 0.5 / 6, within 4 standard errors. A loss on the given ones would teach how to
    find them."""
    puzzle, rng, count = puzzle_of("countdown"), random.Random(0), 2000
    drawn = [draw(puzzle, "train", 0, i) for i in range(count)]
    hits = lambda make: sum(make(p, rng).reached == p.gold.target for p in drawn) / count
    alone, reviewed = hits(puzzle.attempt), hits(puzzle.first_answer)
    assert 0.10 < alone < 0.25
    assert abs(reviewed - (0.5 + alone / 2)) < 4 * (0.25 / count) ** 0.5
    task = make_task(TaskConfig("countdown"))
    for index in range(200):
        branches = base.dialogue_branches(task, base.BaseConfig(), index)
        assert len(branches) in (3, 4)  # given, or not
        if len(branches) == 3:  # the given answer is in all prompts, and has no loss
            assert all(len(branch.path) > 2 for branch in branches)


# ---- the base ------------------------------------------------------------------------------------


def test_every_setting_of_a_base_changes_its_name():
    """Catches a cached base made with other settings. The task's own seed is none of them."""
    task, config = TaskConfig(), base.BaseConfig()
    paths = [base.base_path(task, config, "cpu", "float32")]
    others = dict(task="chain", reviewer="fair", start="out/run")
    for field, value in vars(task).items():
        other = dataclasses.replace(
            task, **{field: others[field] if field in others else value + 1}
        )
        paths.append(base.base_path(other, config, "cpu", "float32"))
    for field, value in vars(config).items():
        other = {field: others[field] if field in others else value + 1}
        paths.append(base.base_path(task, dataclasses.replace(config, **other), "cpu", "float32"))
    paths.append(base.base_path(task, config, "cuda", "float32"))
    paths.append(base.base_path(task, config, "cpu", "bfloat16"))
    assert len(set(paths)) == len(paths) == 17
    assert base.base_path(task, config, "cpu", "float32") == paths[0]
    assert paths[0].name.startswith("base-solve-") and paths[0].suffix == ".pt"


def test_changed_code_changes_the_name_of_a_base(tmp_path, monkeypatch):
    """Catches a cached base made by other code: model.py and every file of tasks/ count."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "model.py").write_text("a = 1\n")
    (tmp_path / "tasks/base.py").write_text("b = 1\n")
    monkeypatch.setattr(base, "__file__", str(tmp_path / "tasks/base.py"))
    names = []
    for file, text in (("model.py", "a = 1\n"), ("model.py", "a = 2\n"), ("tasks/new.py", "")):
        (tmp_path / file).write_text(text + "c = 1\n")
        names.append(base.base_path(TaskConfig(), base.BaseConfig(), "cpu", "float32").name)
    assert len(set(names)) == 3 and len({name.split("-")[2] for name in names}) == 1


@pytest.mark.slow
def test_a_base_is_made_once_and_reused(tmp_path, monkeypatch):
    """Catches minutes of training for a base that is there, and a file that is read as another
    model: what was measured comes back with the weights."""
    monkeypatch.chdir(tmp_path)
    task, config, said = TaskConfig("chain"), base.BaseConfig(depth=1, heads=1, base_tokens=1), []
    model, measured, path = base.base_model(task, config, "cpu", "float32", said.append)
    assert path.exists() and "WARNING" in said[-1]  # one step teaches nothing
    monkeypatch.setattr(base, "pretrain", lambda *_: pytest.fail("a second base was made"))
    again, found, _ = base.base_model(task, config, "cpu", "float32", said.append)
    assert said[-1] == f"base: reusing {path}" and found == measured
    for one, other in zip(model.parameters(), again.parameters()):
        assert torch.equal(one, other)


def test_a_damaged_base_is_put_aside_and_made_anew(tmp_path, monkeypatch):
    """Catches a base with a flipped bit or a block of zeros that trains on, a traceback, and a
    damaged file that is lost or met again."""
    monkeypatch.chdir(tmp_path)
    task, config, said = TaskConfig(), base.BaseConfig(depth=1, heads=1), []
    shape = base.base_shape(make_task(task), config)
    model, measured = base.new_model(shape, 0, "cpu", "float32"), dict(skills=(0.5, 0.5), tokens=1)
    monkeypatch.setattr(base, "pretrain", lambda *_: (model, measured))
    _, _, path = base.base_model(task, config, "cpu", "float32", said.append)
    content = path.read_bytes()
    flipped, zeroed = bytearray(content), bytearray(content)
    flipped[len(content) // 2] ^= 1
    zeroed[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    other = GPT(ModelConfig(50, 32, 1, 2, 1, 16, 32, 64))
    save_checkpoint("other.pt", other, measured=measured, config={})
    save_checkpoint("unmeasured.pt", model)
    others = Path("other.pt").read_bytes(), Path("unmeasured.pt").read_bytes()
    for damaged in (flipped, zeroed, content[: len(content) // 2], b"", *others):
        path.write_bytes(damaged)
        said.clear()
        made, found, _ = base.base_model(task, config, "cpu", "float32", said.append)
        assert found == measured and torch.equal(made.norm.weight, model.norm.weight)
        assert str(path) in said[0] and "\n" not in said[0]
        assert f"put aside as {path}.damaged, and made anew" in said[0]
        assert Path(f"{path}.damaged").read_bytes() == damaged
        base.base_model(task, config, "cpu", "float32", said.append)
        assert said[1:] == [f"base: reusing {path}"]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    """Catches a schedule that jumps, or ends above 0."""
    rate = lambda step, fall=None: base.learning_rate(1.0, step, fall)
    assert [rate(0), rate(24), rate(49), rate(500)] == [0.02, 0.5, 1.0, 1.0]
    fall = (1000, 1500, 0.5)
    assert rate(1000, fall) == 0.5 and rate(1750, fall) == 0.25 and rate(2500, fall) == 0.0


@pytest.mark.parametrize(
    "budget, found, steps, weak",
    [
        (99_000, [(0.9, 0.9, 0.9, 0.8)], 40 + 60, False),
        (99_000, [(0.9, 0.9, 0.8, 0.9), (0.9, 0.9, 0.9, 0.7), (0.9,) * 4], 100 + 30 + 15, False),
        (99_000, [(0.9, 0.9, 0.8, 0.9)] * 3, 100 + 30 + 15, True),  # the next fall were too short
        (12_900, [(0.9, 0.9, 0.9, 0.7)], 100, True),
    ],
)
def test_a_base_goes_on_until_it_is_good_enough(budget, found, steps, weak, monkeypatch):
    """Catches a base that is called good though one turn or its new tries are below the bar, one
    that goes on when it is good or when its tokens are used, and a learning rate that does not
    fall: first answers are learnt at step 40, a step has 100 tokens."""
    rates, said, found = [], [], list(found)
    monkeypatch.setattr(base, "train_step", lambda *args: (rates.append(args[-1]), (100, 0.0))[1])
    first = lambda: (0.5 * (len(rates) >= 40),)
    measured = lambda sampler, task, count, looks: found.pop(0) if looks > 1 else first()
    monkeypatch.setattr(base, "measure", measured)
    monkeypatch.setattr(base, "CHECK_EVERY", 8)
    monkeypatch.setattr(base, "skills_of_texts", lambda *_: (1.0,) * 4)
    monkeypatch.setattr(base, "in_parallel", lambda sampler: sampler)
    config = base.BaseConfig(depth=1, heads=1, base_tokens=budget)
    task = make_task(TaskConfig(looks=3))
    _, extra = base.pretrain(task, config, "cpu", "float32", said.append)
    assert len(rates) == steps and extra["tokens"] == 100 * steps and not found
    assert any("below the bar" in line for line in said) == weak
    peak = rates[40]
    assert rates[99] == pytest.approx(peak / 60)
    if steps > 100:
        assert rates[100] == peak / 2 and rates[129] == pytest.approx(peak / 60)


def test_parameter_groups_hold_everything_once():
    """Catches a parameter that no optimiser group holds (it would never learn), or the tied head
    twice."""
    for tied in (True, False):
        model = GPT(ModelConfig(vocab_size=50, qkv_bias=True, qk_norm=True, tied=tied))
        groups = base.parameter_groups(model)
        everything = [p for group in groups.values() for p in group]
        assert len({id(p) for p in everything}) == len(everything) == len(list(model.parameters()))
        assert len(groups["embeddings"]) == 2 - tied and len(groups["matrices"]) == 4 * 4
        assert all(p.dim() == 1 for p in groups["vectors"])


def test_texts_of_a_base_have_their_loss_on_every_answer():
    """Catches a loss on questions or phrases, an answer without one, a target without its end
    token, and a prompt that is not all that stands before the answer."""
    task = make_task(TaskConfig())
    decode, end = task.encoding.decode, task.encoding.eot_token
    for index in range(20):
        branches = base.dialogue_branches(task, base.BaseConfig(), index)
        assert len(branches) == task.puzzle.looks
        text = ""
        for k, branch in enumerate(branches):
            (_, question), *above, (_, own) = branch.path
            assert own == branch.sampled[:-1] and branch.sampled[-1] == end
            assert decode(own).count("<answer>") == 1 and decode(question).endswith(")\n")
            before = decode(question + [i for _, tokens in above for i in tokens])
            assert before.startswith(text) and before.count("<answer>") == k
            assert k == 0 or before.endswith(tuple(map(phrase_text, PHRASES)))
            text = before + decode(own)


def test_the_loss_of_a_step_is_that_of_its_texts_one_by_one(gpt):
    """Catches a step whose halves are weighted or joined wrongly, and texts that see each other:
    gradients equal those of padded rows in one pass, whole and in parts."""
    task = make_task(TaskConfig("chain", operations=2, looks=2))
    config = base.BaseConfig(depth=1, heads=1)
    texts = [base.dialogue_branches(task, config, index) for index in range(5)]
    model = base.new_model(base.base_shape(task, config), 0, "cpu", "float32")
    branches = [branch for text in texts for branch in text]
    prompts = [[i for _, tokens in b.path[:-1] for i in tokens] for b in branches]
    logp, _ = padded_logprobs(model, pad_rows(prompts, [b.sampled for b in branches], "cpu"))
    loss = -logp.sum() / sum(len(b.sampled) for b in branches)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([x.norm() for x in wanted]).norm().clamp(min=1)  # the step clips it to 1
    seen = []

    class Watch(torch.optim.SGD):
        def step(self):
            seen.append([p.grad.clone() for p in model.parameters()])

    for context in (contextlib.nullcontext(), threads.apart(model)):
        with context:
            tokens, found = base.train_step(model, [Watch(model.parameters(), 0.0)], texts, 0.0)
            assert tokens == sum(len(part) for text in texts for _, part in text[-1].path)
            assert found == pytest.approx(loss.item(), rel=1e-5)
    for gradients in seen:
        for ours, theirs in zip(gradients, wanted):
            torch.testing.assert_close(ours, theirs / norm, rtol=1e-4, atol=1e-6)


# ---- tokenizer -----------------------------------------------------------------------------------


def test_any_text_round_trips(encoding):
    """Catches text that cannot be encoded: 3,000 random strings of any Unicode come back exactly,
    and never hold the end token."""
    rng = random.Random(0)
    ranges = (range(128), range(0xD800), range(0xE000, 0x110000))
    strings = [*TAGS, *WORDS, *PHRASES, "<|endoftext|>", "12", "007"]
    for _ in range(3000):
        parts = [
            rng.choice([chr(rng.choice(rng.choice(ranges))), *strings])
            for _ in range(rng.randint(0, 12))
        ]
        ids = encoding.encode_ordinary("".join(parts))
        assert encoding.decode(ids) == "".join(parts)
        assert encoding.eot_token not in ids and all(0 <= i < encoding.n_vocab for i in ids)


def test_what_tasks_write_is_one_token_each(encoding):
    """Catches a number, tag or phrase cut into bytes: small models learn far slower so."""
    for text in [*TAGS, *WORDS, *PHRASES, *map(str, range(100))]:
        assert len(encoding.encode_ordinary(text)) == 1, text
    ids = encoding.encode_ordinary("<think>7*8=10, 10+7=6</think><answer>7 10 6</answer>")
    parts = "<think>|7|*|8|=|10|, |10|+|7|=|6|</think>|<answer>|7| |10| |6|</answer>"
    assert [encoding.decode([i]) for i in ids] == parts.split("|")
    assert len(encoding.encode_ordinary("<|endoftext|>")) == 13


def test_layer_2_prompt_is_layer_1s_and_more():
    """Catches a phrase whose tokens merge with the attempt's: the tokens of the whole text are
    those of its parts."""
    encode, puzzle = build_encoding().encode_ordinary, puzzle_of("solve")
    problem = draw(puzzle, "train", 0, 0)
    attempt = puzzle.attempt(problem, random.Random(0))
    parts = [prompt_text(problem), attempt.text, phrase_text(PHRASES[3])]
    assert encode("".join(parts)) == [i for part in parts for i in encode(part)]
