"""How good is the model on questions that it cannot have met: a table before a run, a look now and
then, a table after it.

    python train.py --eval-every 5 --look-questions 512      # closer looks
    python report.py out/run                                 # draws them beside what training
                                                             itself measured

The idea. A run's own accuracies (`acc1`, `acc2`) are those of the questions it trains on, a few
hundred answers a step, drawn anew each time. What counts is measured on held-out questions, the
same ones every time: before and after the run on `--eval-questions` of them, greedily and at
temperature 1 (the paper's table); in between, greedily, on `--look-questions` held-out ones, the
same in every look. A look draws no random numbers and changes nothing, so a run with looks is bit
for bit the run without them.
"""

import functools
import time

from eval import evaluate, held_out_questions
from runtime.log import say, write_json
from tables import as_look, percent, table


def due(progress, tenth, c):
    """Whether a step is followed by a look: if it completed a `tenth` of the run, or each
    `--eval-every` steps; not after the last, which the table follows."""
    return (
        bool(c.look_questions)
        and progress.generated < c.tokens
        and (progress.step % c.eval_every == 0 if c.eval_every else tenth)
    )


def look(sampler, setup, progress):
    """A look at some held-out questions, greedily -> fields for the step's line, accuracies with
    their standard errors."""
    c, clock = setup.c, time.perf_counter()
    problems = held_out_questions(setup.task, min(c.look_questions, c.eval_questions))
    found = evaluate(
        sampler,
        setup.encoding,
        problems,
        c.max_new_tokens,
        verifier=setup.verifier,
        say="held-out questions",
    )
    seconds = time.perf_counter() - clock
    progress.looking += seconds
    say(
        f"held out, {found['questions']} questions, greedy: Acc@t1 {percent(found['t1'])}, Acc@t2 "
        f"{percent(found['t2'])}"
    )
    return as_look(found) | dict(seconds_heldout=seconds)


def table_of(name, sampler, setup, progress):
    """The paper's rows for the model as it is, greedy and at temperature 1 -> {"greedy": ...,
    "temperature 1": ...}; also into progress.results."""
    c, clock = setup.c, time.perf_counter()
    problems = held_out_questions(setup.task, c.eval_questions)
    ask = functools.partial(
        evaluate, sampler, setup.encoding, problems, c.max_new_tokens, verifier=setup.verifier
    )
    progress.results[name] = {
        label: ask(temperature=temperature, say=f"{name}, {label}")
        for label, temperature in (("greedy", 0.0), ("temperature 1", 1.0))
    }
    progress.looking += time.perf_counter() - clock


def finish(folder, progress, how_to_evaluate):
    """Prints the paper's table and what took the time, and writes result.json."""
    write_json(folder / "result.json", progress.results)
    for label in ("greedy", "temperature 1"):
        say(
            f"\n{label}\n{table({name: result[label] for name, result in progress.results.items()})}"
        )
    shares = {
        name: took / max(progress.seconds, 1e-9)
        for name, took in (
            ("sampling", progress.sampling),
            ("training", progress.training),
            ("held-out questions", progress.looking),
        )
    }
    shares["saving and the rest"] = 1 - sum(shares.values())
    say(
        f"\ntime: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}; "
        f"{max(shares, key=shares.get)} bounds this run"
    )
    say(f"{folder}: {progress.seconds / 60:.1f} minutes after the base; {how_to_evaluate}")
