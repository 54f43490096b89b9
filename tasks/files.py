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
from tasks.catalog import HELD_OUT, Problem
from verifier import equal as same


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
    return whole if answer and unit and same(answer, whole) else answer


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


class DataSet:
    """Problems of files, drawn like those of a task of tasks.py: `draw(split, seed, index)` is a
    pure function of its arguments.

    Every epoch is a permutation of its own, so each problem comes once before any comes twice.
    `held_out` are files to evaluate on: what is asked there never comes in training, even if it
    stands in both. Without them every eighth problem (by hash) is held out; without files to train
    on there is only what is held out.
    """

    def __init__(self, paths, encoding, prompt_tokens, held_out=(), say=print, known=frozenset()):
        """known: questions (canonical) that a model has been trained on; they are left out of
        `held_out`, and counted."""
        self.paths = [*paths] or [*held_out]
        train, held = (
            load(paths, encoding, prompt_tokens, say),
            load(held_out, encoding, prompt_tokens, say),
        )
        if known and held:
            new = [problem for problem in held if self.canonical(problem) not in known]
            if len(new) < len(held):
                say(
                    f"data: {len(held) - len(new):,} of these {len(held):,} problems were trained "
                    "on by this run, and are left out"
                )
            held = new
        if held_out:
            asked = {self.canonical(problem) for problem in held}
            kept = [problem for problem in train if self.canonical(problem) not in asked]
            if len(kept) < len(train):
                say(
                    f"data: {len(train) - len(kept)} of the training problems are in the "
                    "evaluation data too, and are not trained on"
                )
        else:
            kept, held = (
                [p for p in train if (digest(self.canonical(p)) % HELD_OUT > 0) == kind]
                for kind in (True, False)
            )
        self.splits = {"train": kept, "held out": held}
        for split, problems in self.splits.items():
            if not problems and (split != "train" or paths):
                raise BadInput(
                    f"{', '.join(self.paths)}: no problem is left for the split {split!r}; give "
                    "more data, or --eval-data"
                )

    def __str__(self):
        train, held = (len(self.splits[name]) for name in ("train", "held out"))
        return f"{', '.join(Path(path).name for path in self.paths)}: {train:,} problems to train on, {held:,} held out"

    def canonical(self, problem):
        """What makes two problems the same: the question, but for white space."""
        return " ".join(problem.question.split())

    def draw(self, split, seed, index):
        problems = self.splits[split]
        return problems[
            permutation(len(problems), f"{split}/{seed}/{index // len(problems)}")[
                index % len(problems)
            ]
        ]

    def some(self, split, count, seed):
        """`count` problems (all for 0, or when there are no more), in the order of the file."""
        problems = self.splits[split]
        return [
            problems[i]
            for i in sorted(permutation(len(problems), f"{split}/{seed}")[: count or len(problems)])
        ]


@functools.lru_cache(8)
def permutation(count, seed):
    return random.Random(seed).sample(range(count), count)


def digest(text):
    return hashlib.sha256(text.encode()).digest()[0]


def load(paths, encoding, prompt_tokens, say):
    """The problems of several files whose prompts are not too long; says what was found."""
    found = []
    for path in paths:
        problems, counts = read_problems(path)
        fitting = shorter(problems, encoding, prompt_tokens)
        counts[f"with a prompt of more than {prompt_tokens} tokens"] = len(problems) - len(fitting)
        say(
            f"data: {path}: "
            + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
            + ("" if len(fitting) == sum(counts.values()) else f"; {len(fitting):,} are used")
        )
        found += fitting
    if paths and not found:
        raise BadInput(
            f"{', '.join(paths)}: every prompt has more than {prompt_tokens} tokens; raise "
            "--prompt-tokens"
        )
    return found


def names(text):
    """ "a.jsonl,b.jsonl" -> ["a.jsonl", "b.jsonl"]. BadInput for commas alone."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if text and not found:
        raise BadInput(
            f"{text!r} names no file: give files of problems (data.py), with commas between them"
        )
    return found


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise BadInput("usage: python data.py FILE.jsonl [FILE.jsonl ...]")
    for path in sys.argv[1:]:
        problems, counts = read_problems(path)
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        print(f"  question  {problems[0].question}\n  gold      {problems[0].gold}")


if __name__ == "__main__":
    guarded(main)
