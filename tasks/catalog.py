"""Problems made on the fly: seeded, endless, and verifiable by rule; with the texts that a base
model learns from.

    python tasks.py                                # one problem of each task, with an attempt and a
                                                   review
    python tasks.py --task solve --candidates 5    # the same for a harder `solve`

The idea. To see what a second layer adds one needs problems whose answers a rule can check, whose
difficulty is a knob, and which never run out. Three tasks, because "when does a second look pay?"
has an answer, and it takes three to see it:

  solve      x in {3, 8, 5}, ((x*4)+7)-2 = 6 (mod 11)     which x is it? Finding is HARD: without
             computing every candidate no
             <think>8*4=10, +7=6, -2=4</think>            look at the question tells. Checking is
                                                          EASY: compare the value that
             <answer>8 10 6 4</answer>                    was reached with the one asked for. A
                                                          second look pays.
  chain      ((3*4)+7)-2 = ? (mod 11)                     checking is computing again: as hard as
             the first time. A draw.
  countdown  make 24 from 3, 8, 1                         checking is easy, but when an attempt
             failed the next is hardly
                                                          better placed than the first was.

The answer to `solve` is the whole list of values from the right x to the target: one wrong step
kills it, and no lucky guess of x alone can pass.

The base model's texts (pretrain.py) hold the SEED of each skill and no more: attempts try one
candidate chosen blindly and compute it honestly, so most fail; reviews open by comparing what was
reached with what was asked ("off by 6-4=2: no."), and doubt far too much, as real base models do
when told to double-check (SCoRe, arXiv 2409.12917, table 1: Δ = -11 points). The verdict leans the
right way (92 % "no" to wrong attempts, 60 % to right ones) and that lean is all RL has to work
with. Below 50 % for right attempts the over-doubting would exist in samples only: greedy decoding
takes the likelier word, and is cured.

Train and held-out questions never overlap, nor does what they compute: a question's side goes by
its operations alone (`solve`, `chain`) or by its numbers (`countdown`). A split by the question's
text is not enough: the same operations at the same x would then be worked through in training for
other candidates (of `solve`'s held-out questions 26 % met theirs so within 20,000 training
questions).
"""

import hashlib
import math
import random
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from huggingface.tokenizer import PHRASES
from reward import Makes
from runtime.flags import BadInput, guarded, parse_flags

# how often a review in the base's texts says "no" to a wrong / a right attempt
DOUBTS_WRONG, DOUBTS_RIGHT = 0.92, 0.60
HELD_OUT = 8  # one computation in so many is held out


class Problem(NamedTuple):
    question: str
    gold: Any  # what reward.is_correct compares with: a string or reward.Makes
    data: Any  # the numbers behind the text, for attempt() and review()


class Attempt(NamedTuple):
    text: str  # <think>...</think><answer>...</answer>
    reached: int  # the value the computation ended at
    choice: Any  # what was tried, so that a review can try something else


def prompt_text(problem):
    """The layer-1 template: the question on a line of its own; the model's turn begins on the
    next."""
    return problem.question + "\n"


def phrase_text(phrase):
    """What layer 2 appends to the attempt: "\\n" and the guiding phrase; the model goes on in its
    own turn."""
    return "\n" + phrase


def respond(think, answer):
    return f"<think>{think}</think><answer>{answer}</answer>"


def apply(op, a, b):
    return a * b if op == "*" else a + b if op == "+" else a - b


def nested(start, operations):
    """((x*4)+7)-2 from "x" and [("*", 4), ("+", 7), ("-", 2)]."""
    text = start
    for i, (op, b) in enumerate(operations):
        text = f"{text}{op}{b}" if i == 0 else f"({text}){op}{b}"
    return text


def worked(start, operations, values):
    """8*4=10, +7=6, -2=4 from 8, the operations and the values after each."""
    steps = [f"{op}{b}={value}" for (op, b), value in zip(operations, values)]
    return str(start) + ", ".join(steps)


def draw_operations(rng, count, modulus):
    """`count` of * + - with operands that keep different x different: factors share no divisor with
    the modulus."""
    operations = []
    for _ in range(count):
        op = rng.choice("*+-")
        least = 2 if op == "*" and modulus > 2 else 1
        operations.append(
            (
                op,
                rng.choice(
                    [b for b in range(least, modulus) if op != "*" or math.gcd(b, modulus) == 1]
                ),
            )
        )
    return tuple(operations)


def compute(start, operations, modulus):
    """-> the values after each operation, all mod `modulus`."""
    values = []
    for op, b in operations:
        start = apply(op, start, b) % modulus
        values.append(start)
    return values


def steps(operations, modulus):
    """Operations as numbers, equal where they do the same: -4 is +7 (mod 11)."""
    return tuple(modulus + b if op == "*" else apply(op, 0, b) % modulus for op, b in operations)


def says_no(right, rng):
    """The verdict of a review in the base's texts: the SEED of checking. It leans the right way,
    and doubts too much."""
    return rng.random() < (DOUBTS_RIGHT if right else DOUBTS_WRONG)


# ---- tasks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solve:
    """Guess and check: which of one to `candidates` values of x reaches the target after
    2..`operations` operations?"""

    candidates: int = 3
    operations: int = 4
    modulus: int = 11

    def sample(self, rng):
        candidates = tuple(
            rng.sample(range(self.modulus), rng.randint(1, min(self.candidates, self.modulus)))
        )
        operations = draw_operations(rng, rng.randint(2, max(2, self.operations)), self.modulus)
        values = compute(candidates[0], operations, self.modulus)
        shuffled = tuple(rng.sample(candidates, len(candidates)))
        question = f"x in {{{', '.join(map(str, shuffled))}}}, {nested('x', operations)} = {values[-1]} (mod {self.modulus})"
        gold = " ".join(map(str, [candidates[0], *values]))
        return Problem(question, gold, (shuffled, operations, values[-1]))

    def canonical(self, problem):
        candidates, operations, target = problem.data
        return f"{sorted(candidates)} {operations} {target} {self.modulus}"

    def computation(self, problem):
        """The operations without x, since attempts at a question work through wrong candidates,
        too."""
        return steps(problem.data[1], self.modulus)

    def attempt(self, problem, rng, without=None):
        """Tries one candidate, chosen blindly among those not in `without`, and computes it
        honestly."""
        candidates, operations, _ = problem.data
        x = rng.choice([c for c in candidates if c != without] or candidates)
        values = compute(x, operations, self.modulus)
        text = respond(worked(x, operations, values), " ".join(map(str, [x, *values])))
        return Attempt(text, values[-1], x)

    def review(self, problem, attempt, rng):
        """Compares, then confirms the attempt or tries another candidate."""
        target = problem.data[2]
        return compare_then(
            attempt,
            target,
            (target - attempt.reached) % self.modulus,
            lambda: self.attempt(problem, rng, without=attempt.choice),
            rng,
        )


@dataclass(frozen=True)
class Countdown:
    """Make the target from all of `numbers` given numbers with + - *, every value on the way in
    0..12."""

    numbers: int = 4

    def sample(self, rng):
        numbers = tuple(rng.randint(1, 9) for _ in range(self.numbers))
        order, operations, values = self.expression(numbers, rng)
        question = (
            f"make {values[-1]} from {', '.join(map(str, rng.sample(numbers, len(numbers))))}"
        )
        return Problem(
            question, Makes(values[-1], tuple(sorted(numbers))), (order, operations, values)
        )

    def canonical(self, problem):
        return str(problem.gold)

    def computation(self, problem):
        """The numbers in ascending order, without the target: attempts that miss it reach others,
        and so work these out."""
        return problem.gold.numbers

    def expression(self, numbers, rng):
        """-> first number, operations and values of a random left-to-right expression that stays in
        0..12."""
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            operations = [(rng.choice("+-*"), b) for b in rest]
            value, values = first, []
            for op, b in operations:
                value = apply(op, value, b)
                values.append(value)
            if all(0 <= v <= 12 for v in values):
                return first, operations, values

    def attempt(self, problem, rng):
        """Any expression over the numbers, computed honestly: about one in six hits the target."""
        return self.written(*self.expression(problem.gold.numbers, rng))

    def written(self, first, operations, values):
        return Attempt(
            respond(worked(first, operations, values), nested(str(first), operations)),
            values[-1],
            None,
        )

    def review(self, problem, attempt, rng):
        target = problem.gold.target
        return compare_then(
            attempt, target, target - attempt.reached, lambda: self.attempt(problem, rng), rng
        )


@dataclass(frozen=True)
class Chain:
    """A chain of 2..`operations` operations mod `modulus`: nothing to choose, everything to
    compute."""

    operations: int = 4
    modulus: int = 11
    slip: float = 0.08  # how often a step in the base's texts is wrong

    def sample(self, rng):
        start = rng.randrange(self.modulus)
        operations = draw_operations(rng, rng.randint(2, max(2, self.operations)), self.modulus)
        values = compute(start, operations, self.modulus)
        return Problem(
            f"{nested(str(start), operations)} = ? (mod {self.modulus})",
            str(values[-1]),
            (start, operations),
        )

    def canonical(self, problem):
        return problem.question

    def computation(self, problem):
        return steps(problem.data[1], self.modulus)

    def slipping(self, problem, rng):
        """-> values like compute's, in which every step goes wrong with probability `slip`; what
        follows builds on it."""
        value, operations = problem.data
        values = []
        for op, b in operations:
            value = (
                rng.randrange(self.modulus)
                if rng.random() < self.slip
                else apply(op, value, b) % self.modulus
            )
            values.append(value)
        return values

    def attempt(self, problem, rng):
        values = self.slipping(problem, rng)
        return Attempt(respond(worked(*problem.data, values), str(values[-1])), values[-1], None)

    def review(self, problem, attempt, rng):
        """There is nothing to compare with, so a review computes again, as carefully as the first
        time, and no better."""
        values = self.slipping(problem, rng)
        return respond("again: " + worked(*problem.data, values), str(values[-1]))


def attempt_to_review(task, problem, rng):
    """The attempt that a review text stands behind. No loss is on it, so it need not be typical:
    where nearly all attempts fail, half of them are made right here, or there would be too few
    "yes" to learn from."""
    return (
        task.written(*problem.data)
        if isinstance(task, Countdown) and rng.random() < 0.5
        else task.attempt(problem, rng)
    )


def compare_then(attempt, target, off, another, rng):
    """A review that opens by comparing, "off by 6-4=2" (asked minus reached), says yes or no, and
    confirms the attempt or makes `another` (a function of nothing, so that nothing is drawn when it
    is not needed)."""
    opening = f"off by {target}-{attempt.reached}={off}"
    if not says_no(attempt.reached == target, rng):
        return f"<think>{opening}: yes</think>" + attempt.text.partition("</think>")[2]
    return another().text.replace("<think>", f"<think>{opening}: no. ", 1)


# ---- streams -------------------------------------------------------------------------------------

TASKS = {"solve": Solve, "chain": Chain, "countdown": Countdown}


def make_task(name, candidates=3, operations=4, modulus=11, numbers=4):
    """The task called `name`, with the difficulty that concerns it. BadInput when a number is out
    of its range."""
    for what, value, least, most in (
        ("modulus", modulus, 3, 97),
        ("candidates", candidates, 1, modulus),
        ("operations", operations, 2, 12),
        ("numbers", numbers, 2, 6),
    ):
        if not least <= value <= most:
            raise BadInput(f"--{what} {value} is out of range: choose {least} to {most}")
    given = dict(candidates=candidates, operations=operations, modulus=modulus, numbers=numbers)
    return TASKS[name](
        **{field.name: given[field.name] for field in fields(TASKS[name]) if field.name in given}
    )


def token_limits(task):
    """-> (question, completion): upper bounds in tokens; a completion gets half as much again as a
    right one can need."""
    steps = getattr(task, "operations", 0) or task.numbers
    return 24 + 5 * steps + 2 * getattr(task, "candidates", 0), int(1.5 * (16 + 7 * steps))


def held_out(task, problem):
    """Which side of the split a question falls on: a property of what it computes, whatever seed
    drew it.

    Of the computations that begin alike about an eighth is held out, by the last number; a hash
    says where the counting begins. A hash of the whole is simpler, but leaves a small task to luck:
    of the 49 computations of `--preset smoke` one such hash held out 3.
    """
    *first, last = task.computation(problem)
    return (hashlib.sha256(str(first).encode()).digest()[0] + last) % HELD_OUT == 0


def draw(task, split, seed, index):
    """Problem `index` of a stream: a pure function of its arguments, so data order never depends on
    what ran before.

    split: "train" or "held out". -> Problem. A data set (data.py) has a way of its own, since it
    ends.
    """
    if hasattr(task, "draw"):
        return task.draw(split, seed, index)
    rng = random.Random(f"{split}/{seed}/{index}")
    for _ in range(10_000):
        problem = task.sample(rng)
        if held_out(task, problem) == (split == "held out"):
            return problem
    raise BadInput(
        f"no {split} question in 10,000 draws: the task {task} has too few different questions; "
        "make it harder"
    )


def task_of(config):
    """The task that a config with the fields task, candidates, operations, modulus and numbers (an
    object or a dict) describes."""
    given = config if isinstance(config, dict) else vars(config)
    return make_task(
        given["task"], *(given[name] for name in ("candidates", "operations", "modulus", "numbers"))
    )


def longest_phrase(encoding):
    """Tokens of the longest guiding phrase, as it is appended."""
    return max(len(encoding.encode_ordinary(phrase_text(phrase))) for phrase in PHRASES)


def prompts_and_golds(encoding, problems):
    """-> (token ids of each prompt, each gold answer). A real model's encoding has a template of
    its own (prompts.py)."""
    template = getattr(encoding, "template", None)
    return [
        template(p.question) if template else encoding.encode_ordinary(prompt_text(p))
        for p in problems
    ], [p.gold for p in problems]


@dataclass(frozen=True)
class Config:
    task: Literal["all", "solve", "chain", "countdown"] = "all"  # which task to show
    candidates: int = 3  # solve: most candidates for x
    operations: int = 4  # solve, chain: most operations
    modulus: int = 11  # solve, chain: arithmetic is mod this
    numbers: int = 4  # countdown: how many numbers are given
    seed: int = 0  # another seed, other problems


def main():
    c = parse_flags(Config, __doc__)
    for name in TASKS if c.task == "all" else (c.task,):
        task = make_task(name, c.candidates, c.operations, c.modulus, c.numbers)
        problem, rng = draw(task, "train", c.seed, 0), random.Random(c.seed)
        attempt = task.attempt(problem, rng)
        print(f"{name}\n  question  {problem.question}\n  gold      {problem.gold}")
        print(f"  attempt   {attempt.text}\n  review    {task.review(problem, attempt, rng)}")


if __name__ == "__main__":
    guarded(main)
