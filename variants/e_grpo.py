"""E-GRPO: a wrong answer is paid for the entities that it has right (arXiv 2510.24694).

    R_i = 1 if right,  α γ̂_i if wrong,  0 if malformed or cut off
    γ_i = matched entities / all entities,   γ̂_i = γ_i / max_j γ_j

So a group of wrong answers has a signal. Malformed and cut answers count in mean and std, and have
no gradient: a broken form is never pushed down. (The paper says so of cut ones.)

Confirmed: the reward, α = 0.3. (The paper has groups of 8, clip-higher, learning rate 2e-6.) A
stand-in: the entities of a tiny task are the values of its computation, compared position by
position, since numbers mod 11 in any order match by chance. Countdown has none, so there this is
GRPO. The method sees the gold solution.
"""

import re

import torch

from mgrpo import Method
from reward import extract_answer, has_form


def near_misses(group, alpha=0.3):
    """-> [n] rewards. group.problems, texts, correct, truncated: of n answers."""
    pairs = [matched(text, problem) for text, problem in zip(group.texts, group.problems)]
    counts = torch.tensor([n for n, _ in pairs], dtype=torch.float32)
    return shared_credit(group.correct, counts, well_formed(group), alpha)


def shared_credit(correct, matched, ok, alpha=0.3):
    """The formula. correct, ok: [n] bool; matched: [n] entities -> [n] rewards."""
    share = matched / matched.max().clamp(min=1e-9)  # γ̂: the number of all entities cancels
    return torch.where(correct, torch.ones_like(share), alpha * share) * ok


def well_formed(group):
    """-> [n] bool: an answer in the template, and not cut off."""
    return torch.tensor([formed(text) for text in group.texts]) & ~group.truncated


def formed(text):
    """Whether a response has an answer and, if it thinks in tags, the whole template."""
    return has_form(text) if "<think>" in text else extract_answer(text) is not None


def matched(text, problem):
    """-> (values of the right computation that stand at their place, all values)."""
    return matched_values(own_work(text), right_values(problem))


def own_work(text):
    """The part of a response that computes its answer.

    A correction begins with a review of the answer above ("off by 6-4=2: no. "), whose numbers are
    not its own. A confirmation ("off by 6-6=0: yes") computes nothing: its answer stands for it.
    """
    think, _, answer = text.partition("</think>")
    work = think.rpartition(": no. ")[2]
    confirms = work.rstrip().endswith(": yes")
    return " ".join(f"={n}" for n in re.findall(r"-?\d+", answer)[1:]) if confirms else work


def matched_values(think, right):
    """think: text with results behind "="; right: [int] -> (matched, len(right))."""
    stated = [int(value) for value in re.findall(r"= ?(-?\d+)", think)]
    return sum(a == b for a, b in zip(stated, right)), len(right)


def right_values(problem):
    """-> [int], the value after each operation of a `solve` or `chain` problem; else []."""
    return [value for *_, value in right_steps(problem)]


def right_steps(problem):
    """-> [(a, op, b, value), ...] of a `solve` or `chain` problem; else []."""
    question = re.search(r"(?:\(*)(x|\d+)((?:[+*-]\d+\)?)+) = .*\(mod (\d+)\)", problem.question)
    if not question:
        return []
    value, steps = int(problem.gold.split()[0] if question[1] == "x" else question[1]), []
    for op, b in re.findall(r"([+*-])(\d+)", question[2]):
        a, b = value, int(b)
        value = (a * b if op == "*" else a + b if op == "+" else a - b) % int(question[3])
        steps.append((a, op, b, value))
    return steps


def solution(problem):
    """The right answer as the base's texts write it; None for a problem without steps."""
    steps = ", ".join(f"{a}{op}{b}={value}" for a, op, b, value in right_steps(problem))
    return f"<think>{steps}</think><answer>{problem.gold}</answer>" if steps else None


METHOD = Method(
    "E-GRPO, arXiv 2510.24694: near misses are paid; entities here are intermediate values",
    reward=near_misses,
    keep=well_formed,
)
