"""Benchmarks on disk: lines of JSONL become problems, whichever of the known sets they come from.

    python data.py gsm8k/train.jsonl math500.jsonl        # what is in these files, and the first
                                                          problem of each

The idea. Every set of mathematical problems is a question and a gold answer; they differ in what
the fields are called. A line is recognised by its fields, so nothing needs to be declared, and
files of several sets may be mixed:

    question, answer with "#### 72"        GSM8K              gold: what stands after ####
    problem, answer (and solution)         MATH-500, plain    gold: the answer
    problem, solution                      MATH, Minerva      gold: the last \\boxed{...} of the
                                           solution
    question, final_answer: [...]          OlympiadBench      gold: the answers, joined with commas;
                                           its context precedes the question
    question, answer                       plain              gold: the answer

A line that is not a problem stops the run with its file, number and fault, because a set that is
silently smaller gives another score. Rows that are problems but have no gold answer, and prompts
that are too long, are left out and COUNTED. OlympiadBench's units are part of its golds where the
verifier can read them; its tolerances (`error`) are not applied, and its questions with images are
asked without them.
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


def after_hashes(answer):
    """GSM8K's gold: what stands behind the last "####"."""
    return answer.rpartition("####")[2]


# What a set's lines hold besides its question: (name, fields that it must have, test on them, where
# the gold answer is).
FORMS = (
    (
        "OlympiadBench",
        ("question", "final_answer"),
        lambda row: True,
        lambda row: olympiad_gold(row["final_answer"]),
    ),
    (
        "GSM8K",
        ("question", "answer"),
        lambda row: "####" in row["answer"] if isinstance(row["answer"], str) else False,
        lambda row: after_hashes(row["answer"]),
    ),
    ("problem and answer", ("problem", "answer"), lambda row: True, lambda row: plain_gold(row)),
    (
        "problem and solution",
        ("problem", "solution"),
        lambda row: True,
        lambda row: boxed(row["solution"]),
    ),
    ("question and answer", ("question", "answer"), lambda row: True, lambda row: plain_gold(row)),
)
KNOWN = "; ".join(dict.fromkeys(" + ".join(fields) for _, fields, _, _ in FORMS))
# fields that tell kinds of problems apart; they go into transcripts
ABOUT = ("level", "subject", "type", "subfield")


def boxed(solution):
    """The last \\boxed{...} of a solution, "" without one."""
    return (last_box(solution)[1] or "") if isinstance(solution, str) else ""


def plain_gold(row):
    """The answer as text; where it is empty, the last box of the solution."""
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"its answer is {type(answer).__name__}, not text or a number")
    return (answer or "").strip() or boxed(row.get("solution"))


def olympiad_gold(answers):
    """OlympiadBench keeps a list, nearly always of one text that may itself hold several
    answers."""
    answers = [answers] if isinstance(answers, str) else answers or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("its final_answer is not a list of texts")
    return ", ".join(answers)


class Source(NamedTuple):
    """Where a problem is from, and its worked solution, if there is one."""

    place: str  # "file:line"
    solution: str = ""
    about: dict = {}  # the fields of ABOUT that its line has


def with_unit(answer, unit):
    """An answer with its set's unit, if the verifier then still takes the bare answer for right: a
    unit that it cannot read would only turn right answers into wrong ones."""
    whole = rf"{answer} {unit}" if "\\" in unit else rf"{answer} \text{{ {unit}}}"
    return whole if answer and unit and equal(answer, whole) else answer


def read_problem(line):
    """One line of JSON -> (form's name, question, gold, solution, what it is about). Raises
    ValueError saying what is wrong with it."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        whole = (
            "; a file that is one JSON array must be written with an object a line"
            if line.lstrip().startswith("[")
            else ""
        )
        raise ValueError(f"it is not JSON ({getattr(error, 'msg', error)}){whole}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, not an object with fields")
    for name, fields, test, gold in FORMS:
        if all(field in row for field in fields) and test(row):
            question = row[fields[0]]
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"its {fields[0]} is empty or not text")
            context = row.get("context") if name == "OlympiadBench" else None
            question = (
                f"{context.strip()}\n\n{question}"
                if isinstance(context, str) and context.strip()
                else question
            )
            answer, solution = (
                gold(row).strip(),
                row["answer"].rpartition("####")[0] if name == "GSM8K" else row.get("solution"),
            )
            try:
                f"{question}{answer}".encode()
            except UnicodeEncodeError:
                raise ValueError("it holds half of a character (a lone surrogate)") from None
            if name == "OlympiadBench" and isinstance(row.get("unit"), str):
                answer = with_unit(answer, row["unit"].strip().strip("$"))
            solution = solution.strip() if isinstance(solution, str) else ""
            return (
                name,
                question.strip(),
                answer,
                solution,
                {field: row[field] for field in ABOUT if field in row},
            )
    raise ValueError(f"its fields are {', '.join(row) or 'none'}; a problem has {KNOWN}")


def read_problems(path):
    """-> ([Problem], Counter of what was found and left out). `data` of a problem is its Source.

    BadInput names the file and line of what is not a problem, or a file that is missing, not UTF-8,
    or holds nothing.
    """
    problems, counts = [], Counter()
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name, question, gold, solution, about = read_problem(line)
                    counts[name if gold else "without a gold answer"] += 1
                    problems += (
                        [Problem(question, gold, Source(f"{path}:{number}", solution, about))]
                        if gold
                        else []
                    )
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


def shorter(problems, encoding, prompt_tokens):
    """Those whose prompt has at most `prompt_tokens` tokens."""
    return [
        problem for problem in problems if len(encoding.template(problem.question)) <= prompt_tokens
    ]


def load(paths, encoding, prompt_tokens, say):
    """The problems of several files whose prompts fit -> [Problem]. A line of output for each file
    counts what it holds."""
    loaded = []
    for path in paths:
        problems, counts = read_problems(path)
        fitting = shorter(problems, encoding, prompt_tokens)
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
        if known and asked:
            new = [problem for problem in asked if self.canonical(problem) not in known]
            if len(new) < len(asked):
                say(
                    f"data: {len(asked) - len(new):,} of these {len(asked):,} problems were "
                    "trained on by this run, and are left out"
                )
            asked = new
        if held_out:
            questions = {self.canonical(problem) for problem in asked}
            kept = [problem for problem in train if self.canonical(problem) not in questions]
            if len(kept) < len(train):
                say(
                    f"data: {len(train) - len(kept)} of the training problems are in the "
                    "evaluation data too, and are not trained on"
                )
        else:
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
        chosen = permutation(len(problems), f"held out/{seed}")[: count or len(problems)]
        return [problems[i] for i in sorted(chosen)]

    def canonical(self, problem):
        """-> str, equal for problems that ask the same: the question, but for white space."""
        return " ".join(problem.question.split())

    def draw(self, split, seed, index):
        """Problem `index` of an endless stream over a split -> Problem."""
        problems = self.splits[split]
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


def names(text):
    """ "a.jsonl,b.jsonl" -> ["a.jsonl", "b.jsonl"]. Raises BadInput for commas alone."""
    files = [name.strip() for name in text.split(",") if name.strip()]
    if text and not files:
        raise BadInput(
            f"{text!r} names no file: give JSONL files of problems, with commas between them"
        )
    return files


def main():
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
