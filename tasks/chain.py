"""chain: a chain of operations. Nothing to choose, everything to compute.

    ((3*4)+7)-2 = ? (mod 11)
    <think>3*4=1, +7=8, -2=6</think><answer>6</answer>

There is no target to compare with, so checking is computing again: as hard as the first time. A
second layer has little to offer here.
"""

from dataclasses import dataclass

from tasks.problems import (
    Attempt,
    Problem,
    apply,
    compute,
    draw_operations,
    effects,
    modular_fact,
    nested,
    respond,
    worked,
)


@dataclass(frozen=True)
class Chain:
    """The value after 2 to `operations` operations mod `modulus`."""

    operations: int = 4
    modulus: int = 11
    looks: int = 4  # answers in a row that the texts hold
    slip: float = 0.08  # probability that a step in the base model's texts is wrong; no flag

    @property
    def prompt_tokens(self):
        """Tokens of the longest prompt: a frame, and at most 5 tokens an operation."""
        return 24 + 5 * self.operations

    @property
    def max_new_tokens(self):
        """Tokens of a completion: half as much again as the longest right one needs."""
        return int(1.5 * (16 + 8 * self.operations))

    def sample(self, rng):
        """-> Problem. data: (start, operations)."""
        start = rng.randrange(self.modulus)
        operations = draw_operations(rng, rng.randint(2, max(2, self.operations)), self.modulus)
        values = compute(start, operations, self.modulus)
        question = f"{nested(str(start), operations)} = ? (mod {self.modulus})"
        return Problem(question, str(values[-1]), (start, operations))

    def canonical(self, problem):
        return problem.question

    def computation(self, problem):
        """What decides the side of the held-out split: the operations, whatever the start."""
        return effects(problem.data[1], self.modulus)

    def slipping(self, problem, rng):
        """-> values like compute's, in which every step goes wrong with probability `slip`. Later
        steps build on the wrong value."""
        value, operations = problem.data
        values = []
        for op, b in operations:
            if rng.random() < self.slip:
                # Any value: one slip in `modulus` draws the right one.
                value = rng.randrange(self.modulus)
            else:
                value = apply(op, value, b) % self.modulus
            values.append(value)
        return values

    def attempt(self, problem, rng):
        values = self.slipping(problem, rng)
        return Attempt(respond(worked(*problem.data, values), str(values[-1])), values[-1], None)

    def fact(self, rng):
        return modular_fact(rng, self.modulus)

    def first_answer(self, problem, rng):
        """How a dialogue of the texts begins."""
        return self.attempt(problem, rng)

    def review(self, problem, turns, rng):
        """Computes again, as carefully as the first time and no better."""
        other = self.attempt(problem, rng)
        return other._replace(text=other.text.replace("<think>", "<think>again: ", 1))
