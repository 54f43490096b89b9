"""countdown: make the target from all given numbers with + - *.

    make 11 from 3, 8, 1
    <think>8*1=8, 8+3=11</think><answer>(8*1)+3</answer>

Checking is easy, as in solve. But the next attempt after a failed one is hardly better placed than
the first was: there are many expressions, and a failure rules out one of them.
"""

from dataclasses import dataclass

from reward import Makes
from tasks.problems import (
    Attempt,
    Problem,
    apply,
    compared,
    confirmation,
    nested,
    rejection,
    respond,
    says_no,
    worked,
)

# Every value on the way lies in 0..LARGEST, so that the arithmetic stays as easy as that of solve.
LARGEST = 12


@dataclass(frozen=True)
class Countdown:
    """Make the target from all of `numbers` given numbers, each between 1 and 9."""

    numbers: int = 4
    looks: int = 4  # answers in a row that the texts hold
    reviewer: str = "cues"  # whose reviews the base reads: see problems.REVIEWERS

    @property
    def prompt_tokens(self):
        """Tokens of the longest prompt: a frame, and at most 5 tokens a number."""
        return 24 + 5 * self.numbers

    @property
    def max_new_tokens(self):
        """Tokens of a completion: half as much again as the longest right one needs."""
        return int(1.5 * (16 + 8 * self.numbers))

    def sample(self, rng):
        """-> Problem. data: (first number, operations, values) of an expression that is right;
        gold: reward.Makes, since many other expressions are right too."""
        numbers = tuple(rng.randint(1, 9) for _ in range(self.numbers))
        first, operations, values = self.expression(numbers, rng)
        # In another order than the expression uses them.
        listed = ", ".join(map(str, rng.sample(numbers, len(numbers))))
        gold = Makes(values[-1], tuple(sorted(numbers)))
        return Problem(f"make {values[-1]} from {listed}", gold, (first, operations, values))

    def canonical(self, problem):
        return str(problem.gold)

    def computation(self, problem):
        """What decides the side of the held-out split: the numbers in ascending order, without the
        target. An attempt that misses its target works out the problem of another one."""
        return problem.gold.numbers

    def expression(self, numbers, rng):
        """-> first number, operations and values of a random left-to-right expression over all of
        `numbers`, whose values lie in 0..LARGEST."""
        # Drawn anew until all values are in range: every order with signs that stays in range is
        # equally likely.
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            operations = [(rng.choice("+-*"), b) for b in rest]
            value, values = first, []
            for op, b in operations:
                value = apply(op, value, b)
                values.append(value)
            if all(0 <= v <= LARGEST for v in values):
                return first, operations, values

    def attempt(self, problem, rng):
        """Any expression over the numbers, computed correctly: about one in six hits the target."""
        return self.written(*self.expression(problem.gold.numbers, rng))

    def written(self, first, operations, values):
        """-> Attempt from an expression. Its choice is the last operation: the reviewers' cue."""
        text = respond(worked(first, operations, values), nested(str(first), operations))
        return Attempt(text, values[-1], operations[-1][0])

    def fact(self, rng):
        """-> ("8+3=", "11"), one step of arithmetic with numbers as they occur."""
        while True:
            a, op, b = rng.randint(0, LARGEST), rng.choice("+-*"), rng.randint(1, 9)
            if 0 <= apply(op, a, b) <= LARGEST:
                return f"{a}{op}{b}=", str(apply(op, a, b))

    def first_answer(self, problem, rng):
        """How a dialogue of the texts begins. Half of the time with the expression that made the
        question, or there would be too few "yes" to learn from. There is no loss on that one: it is
        given, not found."""
        if rng.random() < 0.5:
            return self.written(*problem.data)._replace(given=True)
        return self.attempt(problem, rng)

    def review(self, problem, turns, rng):
        """Compares the value that the last answer reached with the target, then confirms that
        answer or tries another expression -> Attempt."""
        last, target = turns[-1], problem.gold.target
        opening = compared(target, last.reached, target - last.reached)
        if says_no(self.reviewer, last.choice, last.reached == target, rng):
            return rejection(self.attempt(problem, rng), opening)
        return confirmation(last, opening)
