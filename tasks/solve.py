"""solve: guess and check. Which of a few values of x reaches the target?

    x in {3, 8, 5}, ((x*4)+7)-2 = 6 (mod 11)
    <think>8*4=10, 10+7=6, 6-2=4</think><answer>8 10 6 4</answer>
    Wait, let me double-check that.
    <think>off by 6-4=2: no. 5*4=9, 9+7=5, 5-2=3</think><answer>5 9 5 3</answer>

Finding x is hard: no look at the question tells, every candidate has to be computed. Checking is
easy: compare the value reached with the target. So a second layer pays here. (In chain.py checking
is as hard as the first answer; in countdown.py it is easy and hardly helps.)

Read this file to write a task of your own. `sample` makes a problem; `canonical` and `computation`
keep held-out problems out of training; `attempt`, `first_answer` and `review` write the texts that
a base model is trained on (base.py).
"""

from dataclasses import dataclass

from tasks.problems import (
    Attempt,
    Problem,
    compared,
    compute,
    confirmation,
    draw_operations,
    effects,
    modular_fact,
    nested,
    rejection,
    respond,
    says_no,
    worked,
)


@dataclass(frozen=True)
class Solve:
    """Which of one to `candidates` values of x reaches the target after 2 to `operations`
    operations?"""

    # The difficulty. Flags of the same names set these fields (catalog.TaskConfig).
    candidates: int = 5
    operations: int = 4
    modulus: int = 11
    looks: int = 4  # answers in a row that the texts hold
    reviewer: str = "cues"  # whose reviews the base reads: see problems.REVIEWERS
    habit: float = 0.0  # share of first answers that check themselves before they end

    # Bounds in tokens (tokenizer.py): a sign, a number below 100 and a word are one token each.

    @property
    def prompt_tokens(self):
        """Tokens of the longest prompt: a frame, "(", ")", operator and operand of each operation,
        and each candidate with its comma."""
        return 24 + 5 * self.operations + 2 * self.candidates

    @property
    def max_new_tokens(self):
        """Tokens of a completion: half as much again as the longest right one needs, with a frame,
        a comparison, and 6 tokens of work and 2 of the answer for each operation."""
        check = 10 + 6 * self.operations if self.habit else 0
        return int(1.5 * (18 + 8 * self.operations + check))

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
    # reviews err. Reinforcement learning does the rest.

    def attempt(self, problem, rng, tried=()):
        """Tries a candidate, chosen blindly among those that no earlier answer tried, and computes
        it correctly. tried: the earlier choices, the last one last."""
        candidates, operations, _ = problem.data
        fresh = [c for c in candidates if c not in tried]
        x = rng.choice(fresh or [c for c in candidates if c != tried[-1]] or candidates)
        values = compute(x, operations, self.modulus)
        text = respond(worked(x, operations, values), " ".join(map(str, [x, *values])))
        return Attempt(text, values[-1], x)

    def fact(self, rng):
        return modular_fact(rng, self.modulus)

    def first_answer(self, problem, rng):
        """How a dialogue of the texts begins: an attempt. A share `habit` of them is checked, and
        mended if the check says no, before it is stated."""
        attempt = self.attempt(problem, rng)
        if not self.habit or rng.random() >= self.habit:
            return attempt
        checked = self.review(problem, [attempt], rng)
        thought = attempt.text.partition("</think>")[0] + ", "
        return checked._replace(text=checked.text.replace("<think>", thought, 1))

    def review(self, problem, turns, rng):
        """Compares the value that the last answer reached with the target, then confirms that
        answer or tries a candidate that no earlier answer tried -> Attempt."""
        last, (_, operations, target) = turns[-1], problem.data
        opening = compared(target, last.reached, (target - last.reached) % self.modulus)
        if says_no(self.reviewer, operations[-1][0], last.reached == target, rng):
            return rejection(self.attempt(problem, rng, [t.choice for t in turns]), opening)
        return confirmation(last, opening)
