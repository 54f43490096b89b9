"""solve: guess and check. Which of a few values of x reaches the target?

    x in {3, 8, 5}, ((x*4)+7)-2 = 6 (mod 11)
    <think>8*4=10, +7=6, -2=4</think><answer>8 10 6 4</answer>

Finding x is hard: no look at the question tells, every candidate has to be computed. Checking is
easy: compare the value reached with the target. So a second layer pays here. (In chain.py checking
is as hard as the first answer; in countdown.py it is easy and hardly helps.)

Read this file to write a task of your own. `sample` makes a problem; `canonical` and `computation`
keep held-out problems out of training; `attempt`, `attempt_to_review` and `review` write the texts
that a base model is trained on (base.py).
"""

from dataclasses import dataclass

from tasks.problems import (
    Attempt,
    Problem,
    compare_and_review,
    compute,
    draw_operations,
    effects,
    nested,
    respond,
    worked,
)


@dataclass(frozen=True)
class Solve:
    """Which of one to `candidates` values of x reaches the target after 2 to `operations`
    operations?"""

    # The difficulty. Flags of the same names set these fields (catalog.TaskConfig).
    candidates: int = 3
    operations: int = 4
    modulus: int = 11

    # Bounds in tokens (tokenizer.py): a sign, a number below 100 and a word are one token each.

    @property
    def prompt_tokens(self):
        """Tokens of the longest prompt: a frame, "(", ")", operator and operand of each operation,
        and each candidate with its comma."""
        return 24 + 5 * self.operations + 2 * self.candidates

    @property
    def max_new_tokens(self):
        """Tokens of a completion: half as much again as the longest right one needs."""
        return int(1.5 * (16 + 7 * self.operations))

    # Problems. All randomness comes from `rng`, a random.Random: same seed, same problem.

    def sample(self, rng):
        """-> Problem. data: (candidates in the order of the question, operations, target)."""
        count = rng.randint(1, min(self.candidates, self.modulus))
        candidates = tuple(rng.sample(range(self.modulus), count))
        operations = draw_operations(rng, rng.randint(2, max(2, self.operations)), self.modulus)
        # The first candidate is the right one; the question lists them in another order.
        values = compute(candidates[0], operations, self.modulus)
        shuffled = tuple(rng.sample(candidates, len(candidates)))
        listed = ", ".join(map(str, shuffled))
        equation = f"{nested('x', operations)} = {values[-1]} (mod {self.modulus})"
        # The answer lists every intermediate value. A model cannot pass by guessing x.
        gold = " ".join(map(str, [candidates[0], *values]))
        return Problem(f"x in {{{listed}}}, {equation}", gold, (shuffled, operations, values[-1]))

    def canonical(self, problem):
        """Equal for problems that ask the same: the order of the candidates does not count."""
        candidates, operations, target = problem.data
        return f"{sorted(candidates)} {operations} {target} {self.modulus}"

    def computation(self, problem):
        """What decides the side of the held-out split: the operations without x, because attempts
        work through wrong candidates too."""
        return effects(problem.data[1], self.modulus)

    # Texts of a base model. They hold the seed of each skill and no more: most attempts fail, and
    # reviews doubt too much. Reinforcement learning does the rest.

    def attempt(self, problem, rng, without=None):
        """Tries one candidate, chosen blindly but for `without`, and computes it correctly."""
        candidates, operations, _ = problem.data
        x = rng.choice([c for c in candidates if c != without] or candidates)
        values = compute(x, operations, self.modulus)
        text = respond(worked(x, operations, values), " ".join(map(str, [x, *values])))
        return Attempt(text, values[-1], x)

    def attempt_to_review(self, problem, rng):
        """The attempt that stands before a review in the texts: any attempt will do."""
        return self.attempt(problem, rng)

    def review(self, problem, attempt, rng):
        """Compares the value reached with the target, then confirms the attempt or tries another
        candidate."""
        target = problem.data[2]
        difference = (target - attempt.reached) % self.modulus
        another = lambda: self.attempt(problem, rng, without=attempt.choice)
        return compare_and_review(attempt, target, difference, another, rng)
