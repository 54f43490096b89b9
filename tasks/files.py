"""Data sets on disk: lines of JSONL become problems, whichever of the known sets they come from.

    python -m tasks.files gsm8k/train.jsonl math500.jsonl      # what these files hold

The idea. Every set of mathematical problems is a question and a gold answer, and sets differ in the
names of the fields. A line is recognised by its fields, so nothing is declared and sets may be
mixed:

    question, answer with "#### 72"     GSM8K             gold: what stands after ####
    problem, answer (and solution)      MATH-500, plain   gold: the answer
    problem, solution                   MATH, Minerva     gold: the solution's last \\boxed{...}
    question, final_answer: [...]       OlympiadBench     gold: the answers, joined with commas
    question, answer                    plain             gold: the answer

A line that is not a problem stops the run, because a set that is silently smaller gives another
score. Problems without a gold answer and prompts that are too long are left out and counted.
"""

import functools
import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from reward import last_box
from runtime.flags import BadInput, guarded
from tasks.problems import HELD_OUT, Problem
from verifier import equal

KNOWN = "question + final_answer; question + answer; problem + answer; problem + solution"
# Fields that tell kinds of problems apart; transcripts repeat them.
ABOUT = ("level", "subject", "type", "subfield")


class Source(NamedTuple):
    """Where a problem comes from, and its worked solution, if there is one: `data` of a Problem."""

    place: str  # "file:line"
    solution: str = ""
    about: dict = {}  # the fields of ABOUT that its line has


# ---- a line --------------------------------------------------------------------------------------


def read_problem(line):
    """One line of JSON -> name of its form, question, gold, solution, fields of ABOUT.

    gold is "" for a problem without one. Raises ValueError that tells what is wrong with the line.
    """
    row = read_object(line)
    name, field, gold = form_of(row)
    question, solution = row[field], row.get("solution")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its {field} is empty or not text")
    gold, context, unit = gold.strip(), row.get("context"), row.get("unit")
    if name != "OlympiadBench":  # which alone has these; another set may mean something else
        context = unit = None
    if isinstance(context, str) and context.strip():
        question = f"{context.strip()}\n\n{question}"
    try:
        # JSON can hold half of a surrogate pair. A transcript could not be written with it, hours
        # later.
        f"{question}{gold}{unit}".encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character (a lone surrogate)") from None
    # OlympiadBench's tolerances (`error`) are not applied, and its images are not shown.
    if isinstance(unit, str):
        gold = with_unit(gold, unit.strip().strip("$"))
    if name == "GSM8K":
        solution = row["answer"].rpartition("####")[0]
    solution = solution.strip() if isinstance(solution, str) else ""
    return name, question.strip(), gold, solution, {x: row[x] for x in ABOUT if x in row}


def read_object(line):
    """A line -> dict. Raises ValueError for what is no JSON object."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        hint = ""
        if line.lstrip().startswith("["):
            hint = "; a file that is one JSON array must be written with an object a line"
        raise ValueError(f"it is not JSON ({getattr(error, 'msg', error)}){hint}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, not an object with fields")
    return row


def form_of(row):
    """A line's fields -> name of its form, field of its question, gold. Raises ValueError for
    fields of no known set."""
    # The most particular fields first: GSM8K's line is also a question with an answer.
    if {"question", "final_answer"} <= row.keys():
        return "OlympiadBench", "question", olympiad_gold(row["final_answer"])
    answer = row.get("answer")
    if "question" in row and isinstance(answer, str) and "####" in answer:
        return "GSM8K", "question", answer.rpartition("####")[2]
    if {"problem", "answer"} <= row.keys():
        return "problem and answer", "problem", plain_gold(row)
    if {"problem", "solution"} <= row.keys():
        return "problem and solution", "problem", boxed(row["solution"])
    if {"question", "answer"} <= row.keys():
        return "question and answer", "question", plain_gold(row)
    raise ValueError(f"its fields are {', '.join(row) or 'none'}; a problem has {KNOWN}")


def plain_gold(row):
    """The answer as text; where it is empty, the last box of the solution."""
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"its answer is {type(answer).__name__}, not text or a number")
    return (answer or "").strip() or boxed(row.get("solution"))


def boxed(solution):
    """The last \\boxed{...} of a solution, "" without one."""
    return (last_box(solution)[1] or "") if isinstance(solution, str) else ""


def olympiad_gold(answers):
    """OlympiadBench has a list, nearly always of one text that may itself hold several answers."""
    answers = [answers] if isinstance(answers, str) else answers or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("its final_answer is not a list of texts")
    return ", ".join(answers)


def with_unit(answer, unit):
    """An answer with its set's unit, if the verifier then still takes the bare answer for right: a
    unit that it cannot read would only turn right answers into wrong ones."""
    whole = rf"{answer} {unit}" if "\\" in unit else rf"{answer} \text{{ {unit}}}"
    return whole if answer and unit and equal(answer, whole) else answer


# ---- files ---------------------------------------------------------------------------------------


def read_problems(path):
    """A file -> [Problem] with a Source each, Counter of the forms and of what is left out.

    Raises BadInput that names the file and line of what is not a problem, or a file that is
    missing, not UTF-8, or without a problem.
    """
    problems, counts = [], Counter()
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                name, question, gold, solution, about = read_problem(line)
                counts[name if gold else "without a gold answer"] += 1
                if gold:
                    source = Source(f"{path}:{number}", solution, about)
                    problems.append(Problem(question, gold, source))
    except FileNotFoundError:
        raise BadInput(
            f"{path}: there is no such file; data is JSONL, a problem a line, with the fields "
            f"{KNOWN}"
        ) from None
    except IsADirectoryError:
        raise BadInput(
            f"{path} is a folder; data is files of JSONL, a problem a line (for MATH's folders: "
            "one line for each of their "
            "files)"
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}") from None
    except ValueError as error:
        raise BadInput(f"{path}:{number}: this line is not a problem: {error}") from None
    if not problems:
        raise BadInput(f"{path} holds no problem with a gold answer")
    return problems, counts


def load(paths, encoding, prompt_tokens, say):
    """The problems of several files whose prompts fit -> [Problem]. A line of output for each file
    counts what it holds."""
    loaded = []
    for path in paths:
        problems, counts = read_problems(path)
        fitting = [p for p in problems if len(encoding.template(p.question)) <= prompt_tokens]
        counts[f"with a prompt of more than {prompt_tokens} tokens"] = len(problems) - len(fitting)
        say(
            f"data: {path}: "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
            + ("" if len(fitting) == sum(counts.values()) else f"; {len(fitting):,} are used")
        )
        loaded += fitting
    if paths and not loaded:
        raise BadInput(
            f"{', '.join(paths)}: every prompt has more than {prompt_tokens} tokens; raise "
            "--prompt-tokens"
        )
    return loaded


# ---- a task --------------------------------------------------------------------------------------


class DataSet:
    """Problems of files as a Task (tasks/problems.py).

    Files of `held_out` are evaluated on: their questions are never trained on, even if `paths`
    repeat them. Without such files every eighth problem (by a hash of its question) is held out.
    Without `paths` the set has held-out problems only; without any files it has none, and serves
    questions that somebody types (tools/chat.py).
    """

    unit = "questions"
    looks = None

    def __init__(
        self,
        paths,
        encoding,
        prompt_tokens,
        held_out=(),
        *,
        max_new_tokens=1024,
        verifier=None,
        known=frozenset(),
        say=print,
    ):
        """paths, held_out: tuples of files. encoding: of the model, with its `template`
        (huggingface/prompts.py). prompt_tokens: problems with a longer prompt are left out, and
        counted. max_new_tokens: of a completion. verifier: see make_verifier. known: canonical
        questions that the model was trained on; they are left out of `held_out`, and counted.

        Raises BadInput for a file that is no data set, and for a split without problems.
        """
        self.encoding, self.verifier = encoding, verifier
        self.prompt_tokens, self.max_new_tokens = prompt_tokens, max_new_tokens
        self.paths = tuple(paths) or tuple(held_out)
        self.name = label(tuple(held_out) or self.paths)
        train = load(paths, encoding, prompt_tokens, say)
        asked = load(held_out, encoding, prompt_tokens, say)
        # A model of a run: it has seen some of these questions.
        if known and asked:
            new = [problem for problem in asked if self.canonical(problem) not in known]
            if len(new) < len(asked):
                say(
                    f"data: {len(asked) - len(new):,} of these {len(asked):,} problems were "
                    "trained on by this run, and are left out"
                )
            asked = new
        # Files to evaluate on are given. A question in both is only evaluated on.
        if held_out:
            questions = {self.canonical(problem) for problem in asked}
            kept = [problem for problem in train if self.canonical(problem) not in questions]
            if len(kept) < len(train):
                say(
                    f"data: {len(train) - len(kept)} of the training problems are in the "
                    "evaluation data too, and are not trained on"
                )
        else:
            # By a hash of the question: its side does not depend on the file or the line it stands
            # in.
            is_held_out = [digest(self.canonical(problem)) % HELD_OUT == 0 for problem in train]
            kept = [problem for problem, held in zip(train, is_held_out) if not held]
            asked = [problem for problem, held in zip(train, is_held_out) if held]
        self.splits = {"train": kept, "held out": asked}
        for split, problems in self.splits.items():
            if not problems and self.paths and (split != "train" or paths):
                raise BadInput(
                    f"{', '.join(map(str, self.paths))}: no problem is left for the split "
                    f"{split!r}; give more data, or --eval-data"
                )

    def __str__(self):
        train, asked = (len(self.splits[name]) for name in ("train", "held out"))
        files = ", ".join(Path(path).name for path in self.paths) or "no files"
        return f"{files}: {train:,} problems to train on, {asked:,} held out"

    def prompt_ids(self, problem):
        """-> [int], the tokens of a problem's layer-1 prompt, in the model's own template."""
        return self.encoding.template(problem.question)

    def train_problems(self, seed, step, count):
        """The `count` problems of a training step, of all ranks together -> [Problem].

        A pure function of (seed, step). Each epoch is a permutation of its own, so every problem
        comes once before any comes twice.
        """
        stream = f"rl/{seed}"
        return [self.draw("train", stream, step * count + i) for i in range(count)]

    def held_out(self, count=0, seed=0):
        """-> `count` held-out problems (0: all of them) in the order of the files. A part is chosen
        at random by `seed`."""
        problems = self.splits["held out"]
        # Chosen at random, then put back into the order of the files.
        chosen = permutation(len(problems), f"held out/{seed}")[: count or len(problems)]
        return [problems[i] for i in sorted(chosen)]

    def canonical(self, problem):
        """-> str, equal for problems that ask the same: the question, but for white space."""
        return " ".join(problem.question.split())

    def draw(self, split, seed, index):
        """Problem `index` of an endless stream over a split -> Problem."""
        problems = self.splits[split]
        # With 5 problems, index 12 is place 2 of epoch 2.
        epoch, place = divmod(index, len(problems))
        return problems[permutation(len(problems), f"{split}/{seed}/{epoch}")[place]]


@functools.lru_cache(8)  # one epoch's permutation serves all of its draws
def permutation(count, seed):
    return random.Random(seed).sample(range(count), count)


def digest(text):
    return hashlib.sha256(text.encode()).digest()[0]


def label(paths):
    """A name for files about a data set: "gsm8k-test" for ("data/gsm8k/test.jsonl",)."""
    stems = ("-".join(filter(None, (Path(p).parent.name, Path(p).stem))) for p in paths)
    return "+".join(stems)[:100]


def make_verifier(name):
    """--verifier -> None for "rules", the rules of verifier/; a MathVerify for "math-verify".

    Raises BadInput where that library is not installed.
    """
    if name == "rules":
        return None
    from verifier.math_verify import MathVerify  # an extra: only who asks for it needs it

    try:
        return MathVerify()
    except ImportError as error:
        raise BadInput(f"--verifier {name}: {error}") from None


def main():
    """Prints what each file holds, and its first problem."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise BadInput("usage: python -m tasks.files FILE.jsonl [FILE.jsonl ...]")
    for path in sys.argv[1:]:
        problems, counts = read_problems(path)
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        print(f"  question  {problems[0].question}\n  gold      {problems[0].gold}")


if __name__ == "__main__":
    guarded(main)
