"""What a task is: problems with a question and a gold answer, some of them held out for evaluation.

    python -m tasks.catalog          # one problem of each built-in task

Two kinds of task share one interface, `Task` below. A GeneratedTask draws problems from a puzzle
(solve.py, chain.py, countdown.py): seeded, endless, nothing to download. A DataSet (files.py) reads
problems from JSONL files such as GSM8K. No caller asks which kind it has.

To add a puzzle, read solve.py, write a class like Solve, and add it to TASKS in catalog.py. This
file holds the rest: the interface, the streams of problems, the held-out split, and the arithmetic
and texts that the three puzzles share.
"""

import functools
import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from runtime.flags import BadInput
from runtime.log import say

HELD_OUT = 8  # one computation (of a data set: one question) in so many is held out
QUESTIONS = 1024  # held-out questions of a built-in task, unless the caller asks for more or fewer


class Problem(NamedTuple):
    question: str
    gold: Any  # the right answer, for reward.score: a string, or reward.Makes
    data: Any  # a puzzle: the numbers behind the text; a data set: files.Source


class Attempt(NamedTuple):
    """A worked answer in the texts of a base model."""

    text: str  # <think>...</think><answer>...</answer>
    reached: int  # the value at the end of the computation
    choice: Any  # what was tried, so that a review can try something else
    given: bool = False  # it only stands before a review: there is no loss on it


class Task(Protocol):
    """The interface of every task. Training, evaluation and chat use nothing else."""

    name: str  # for names of files: "solve", "gsm8k-test"
    unit: str  # a heading for a table's questions: "held-out questions" or "questions"
    encoding: Any  # tiktoken.Encoding of the model
    verifier: Any  # for reward.score: None (the rules of verifier/), or MathVerify
    prompt_tokens: int  # tokens of the longest prompt
    max_new_tokens: int  # tokens of the longest completion; a longer one is truncated
    looks: int | None  # answers in a row that its models know; None: as many as fit the context

    def prompt_ids(self, problem): ...  # -> [int], the layer-1 prompt

    def train_problems(self, seed, step, count): ...  # -> [Problem], the same on every rank

    def held_out(self, count=0, seed=0): ...  # -> [Problem]; count 0: the default number

    def canonical(self, problem): ...  # -> str, equal for problems that ask the same


# ---- problems from a puzzle ----------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedTask:
    """A puzzle as a Task.

    A puzzle is a frozen dataclass of its difficulty with these methods (see solve.py):
    sample(rng) -> Problem, canonical(problem) -> str, computation(problem) -> tuple of hashables,
    and for the base model's texts attempt(problem, rng), first_answer(problem, rng) and
    review(problem, turns, rng), each -> Attempt, and fact(rng) -> ("8*4=", "10"); besides,
    prompt_tokens, max_new_tokens and looks.
    """

    puzzle: Any
    encoding: Any
    max_new_tokens: int

    unit = "held-out questions"
    verifier = None  # the rules of verifier/ know every answer of a puzzle

    @property
    def name(self):
        return type(self.puzzle).__name__.lower()

    @property
    def prompt_tokens(self):
        return self.puzzle.prompt_tokens

    @property
    def looks(self):
        return self.puzzle.looks

    def __str__(self):
        difficulty = (f"{name} {value}" for name, value in vars(self.puzzle).items())
        return f"{self.name}: {', '.join(difficulty)}"

    def prompt_ids(self, problem):
        """-> [int], the tokens of a problem's layer-1 prompt."""
        return self.encoding.encode_ordinary(prompt_text(problem))

    def train_problems(self, seed, step, count):
        """The `count` problems of a training step, of all ranks together -> [Problem].

        A pure function of (seed, step): a resumed run and a run on more GPUs get the same ones.
        """
        stream = f"rl/{seed}"
        return [draw(self.puzzle, "train", stream, step * count + i) for i in range(count)]

    def held_out(self, count=0, seed=0):
        """-> `count` different held-out problems (0: QUESTIONS), always the same ones for a seed.

        A puzzle with few different questions gives fewer; a line of output tells how many.
        """
        return list(different_problems(self.puzzle, count or QUESTIONS, seed))

    def canonical(self, problem):
        """-> str, equal for problems that ask the same."""
        return self.puzzle.canonical(problem)


@functools.lru_cache(4)  # training evaluates on the same questions again and again
def different_problems(puzzle, count, seed):
    """-> tuple of `count` different held-out problems, or fewer after 20 x count draws."""
    # Draws repeat, and the first of equal problems is kept. After 20 draws a problem the puzzle has
    # hardly more.
    problems = {}
    for index in range(20 * count):
        problem = draw(puzzle, "held out", seed, index)
        problems.setdefault(puzzle.canonical(problem), problem)
        if len(problems) == count:
            break
    if len(problems) < count:
        say(
            f"held out: {len(problems):,} different questions are asked, not {count:,}: this task "
            "has hardly more"
        )
    return tuple(problems.values())


def draw(puzzle, split, seed, index):
    """Problem `index` of a stream -> Problem; split: "train" or "held out".

    A pure function of its arguments: the order of problems never depends on earlier draws. Draws
    until a problem of the wanted split comes, eight times on average for a held-out one. Raises
    BadInput for a puzzle with too few different questions.
    """
    # A generator for each problem, named by a string: Random hashes strings in the same way in
    # every process.
    rng = random.Random(f"{split}/{seed}/{index}")
    for _ in range(10_000):
        problem = puzzle.sample(rng)
        if is_held_out(puzzle, problem) == (split == "held out"):
            return problem
    raise BadInput(
        f"no {split} question in 10,000 draws: the task {puzzle} has too few different questions; "
        "make it harder"
    )


def is_held_out(puzzle, problem):
    """The side of the split on which a problem falls: a property of what it computes.

    The side goes by the operations alone (solve, chain) or by the given numbers (countdown). A
    split by the question's text is not enough: training would work through the same operations for
    other candidates. (Of solve's held-out questions 26 % would share their operations and x with
    one of 20,000 training questions.)

    Of the computations that begin alike, one in HELD_OUT is held out, chosen by the last number; a
    hash of the beginning sets the offset. One hash of everything is simpler but leaves a small task
    to luck: of the 49 computations of `--preset smoke` such a hash held out 3.
    """
    # If the hash of the beginning is 3 mod 8, the last numbers 5, 13, 21, ... are held out.
    *first, last = puzzle.computation(problem)
    return (hashlib.sha256(str(first).encode()).digest()[0] + last) % HELD_OUT == 0


# ---- texts ---------------------------------------------------------------------------------------


def prompt_text(problem):
    """The layer-1 template of the built-in tasks: the question and a newline."""
    return problem.question + "\n"


def respond(think, answer):
    """A response in the format that reward.py expects."""
    return f"<think>{think}</think><answer>{answer}</answer>"


def nested(start, operations):
    """((x*4)+7)-2 from "x" and [("*", 4), ("+", 7), ("-", 2)]."""
    text = start
    for i, (op, b) in enumerate(operations):
        text = f"{text}{op}{b}" if i == 0 else f"({text}){op}{b}"
    return text


def worked(start, operations, values):
    """8*4=10, 10+7=6, 6-2=4 from 8, the operations, and the value after each operation.

    Each step repeats the value it starts from. Then a step is four neighbouring symbols, and a base
    has learnt arithmetic after 0.6 M tokens; with "8*4=10, +7=6" it had not after 1.4 M.
    """
    starts = [start, *values]
    steps = [f"{a}{op}{b}={value}" for a, (op, b), value in zip(starts, operations, values)]
    return ", ".join(steps)


# ---- arithmetic ----------------------------------------------------------------------------------


def apply(op, a, b):
    return a * b if op == "*" else a + b if op == "+" else a - b


def compute(start, operations, modulus):
    """-> the values after each operation, all mod `modulus`."""
    values = []
    for op, b in operations:
        start = apply(op, start, b) % modulus
        values.append(start)
    return values


def draw_operations(rng, count, modulus):
    """-> `count` operations (op, operand) with * + -, which map different x to different values.

    A factor must share no divisor with the modulus: 2 * 1 and 2 * 6 are equal (mod 10).
    """
    operations = []
    for _ in range(count):
        op = rng.choice("*+-")
        least = 2 if op == "*" and modulus > 2 else 1  # times 1 is no operation
        # No 0: adding it changes nothing, and times 0 makes all x equal.
        operands = range(least, modulus)
        if op == "*":
            operands = [b for b in operands if math.gcd(b, modulus) == 1]
        operations.append((op, rng.choice(operands)))
    return tuple(operations)


def effects(operations, modulus):
    """Operations as numbers, equal where they have the same effect: -4 is +7 (mod 11)."""
    return tuple(modulus + b if op == "*" else apply(op, 0, b) % modulus for op, b in operations)


def modular_fact(rng, modulus):
    """-> ("8*4=", "10"), one step of arithmetic."""
    ((op, b),), a = draw_operations(rng, 1, modulus), rng.randrange(modulus)
    return f"{a}{op}{b}=", str(compute(a, [(op, b)], modulus)[0])


# ---- reviews in the texts of a base model --------------------------------------------------------

# --reviewer: how often a review says "no" to a right and to a wrong answer, by the last operation
# of its computation. Every reviewer sees the difference to the target and leans the right way. What
# is wrong with them differs:
#   cues      follows a wrong cue: it distrusts products, and trusts what ends with a difference. No
#             change of its "yes" as such mends that: the rows need opposite changes.
#   doubting  rejects most right answers, whatever they are (as models that are told to check do:
#             SCoRe, arXiv 2409.12917, table 1). One number mends it: a little more "yes".
#   lazy      confirms most wrong answers. Again one number mends it.
#   fair      is right most of the time.
REVIEWERS = dict(
    cues={"*": (0.75, 0.98), "+": (0.40, 0.85), "-": (0.10, 0.45)},
    doubting=dict.fromkeys("*+-", (0.60, 0.92)),
    lazy=dict.fromkeys("*+-", (0.10, 0.45)),
    fair=dict.fromkeys("*+-", (0.20, 0.92)),
)


def says_no(reviewer, operation, right, rng):
    """Whether a review rejects an answer that ends with this operation."""
    return rng.random() < REVIEWERS[reviewer][operation][0 if right else 1]


def compared(target, reached, difference):
    """off by 6-4=2 from the target, the value reached, and target - reached."""
    return f"off by {target}-{reached}={difference}"


def confirmation(last, opening):
    """The last answer again -> Attempt, whose text opens with a comparison and "yes"."""
    text = f"<think>{opening}: yes</think>" + last.text.partition("</think>")[2]
    return last._replace(text=text, given=False)


def rejection(other, opening):
    """Another attempt -> Attempt, whose text opens with a comparison and "no"."""
    return other._replace(text=other.text.replace("<think>", f"<think>{opening}: no. ", 1))


def dialogue(puzzle, problem, rng, first=None):
    """The answers of a dialogue in a base's texts -> [Attempt, ...], puzzle.looks of them.

    Each after the first reviews the one before it, and knows all of them. first: the first answer;
    by default one as the texts begin with.
    """
    turns = [first or puzzle.first_answer(problem, rng)]
    while len(turns) < puzzle.looks:
        turns.append(puzzle.review(problem, turns, rng))
    return turns
