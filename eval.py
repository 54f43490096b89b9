"""The paper's table for a model: how often each answer is right, and what each correction changed.

    python eval.py out/solve-mgrpo-0                   # a run on a built-in task
    python eval.py out/run --data math500.jsonl --samples 4 --temperature 0.7
    python eval.py path/to/Qwen2.5-Math-1.5B --data gsm8k/test.jsonl --turns 3

Every question is answered (turn 1). Then a guiding phrase is appended and the model answers again
(turn 2), and so on: the rollout of training, with one correction of every answer. With c_k = right
or wrong in turn k (SCoRe, arXiv 2409.12917, section 3), over all questions:

    Acc@tk = mean c_k          Δ(t1,tN) = Acc@tN - Acc@t1
    Δ i→c  = share wrong in turn k - 1, right in turn k         Δ c→i = the reverse

Errors are standard errors over QUESTIONS: the samples of one question are averaged first, because
they are not independent. Questions are held out: training never drew them.
"""

from runtime import flags  # noqa: F401 - first: Ctrl-C while torch is imported is one sentence

# isort: split
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from mgrpo import SamplingParams, rollout
from reward import extract_answer
from runtime import distributed
from runtime.flags import (
    Above,
    AtLeast,
    AtMost,
    BadInput,
    Below,
    Between,
    check_fields,
    flat,
    make_folder,
    parse_flags,
    read_json,
)
from runtime.log import bar_of_rows, versions, write_json
from runtime.transcripts import Dialogues
from tasks.opening import (
    EVALUATED_ROWS,
    RealConfig,
    make_sampler,
    open_model_and_tasks,
    template_of,
)
from verifier import VerifierFailed, equal

# ---- measuring -----------------------------------------------------------------------------------


def evaluate(
    sampler,
    task,
    problems,
    *,
    turns=2,
    samples=1,
    temperature=0.0,
    seed=0,
    filters=None,
    record=None,
    name="evaluating",
):
    """Asks every problem `samples` times, and for `turns` - 1 corrections of every answer.

    -> {"t1", ..., "delta", "fix2", "broke2", "no_right2", "no_wrong2", "fresh2", ...: (mean,
    standard error), "pass1": {k: ...}, "maj1": ..., "length1", ..., "truncated": share, "tokens":
    mean of all turns together, "undecided": failures of the verifier, "questions", "samples",
    "temperature"}; of all ranks' shares of the problems together. record(problems, layers,
    sampling) gets every batch.
    """
    distributed.agree("questions to be asked", [problem.question for problem in problems])
    share, at_once = distributed.share(len(problems)), max(1, EVALUATED_ROWS // samples)
    batches = []  # of tensors [questions, samples, turns], in the order of `what`
    what = ("correct", "changed", "fresh", "truncated", "lengths")
    votes, undecided = [], 0
    with bar_of_rows(sampler, len(share) * samples * turns, name):
        for start in range(share.start, share.stop, at_once):
            batch = problems[start : min(start + at_once, share.stop)]
            sampling = SamplingParams(
                task.max_new_tokens, temperature, seed, start * samples, filters or {}
            )
            # One correction of every answer: the rows of all layers correspond.
            layers = rollout(sampler, task, batch, (samples, *[1] * (turns - 1)), sampling)
            batches.append([by_turn([getattr(x, name) for x in layers], samples) for name in what])
            undecided += sum(int(layer.undecided.sum()) for layer in layers)
            votes += majorities(layers, samples) if samples > 1 else []
            if record:
                record(batch, layers, sampling)

    # What all ranks found, in the order of the questions.
    ranks = distributed.gather_objects((batches, votes, undecided))
    tensors = map(torch.cat, zip(*(batch for r in ranks for batch in r[0])))
    right, changed, fresh, truncated, lengths = tensors
    votes, undecided = [vote for r in ranks for vote in r[1]], sum(r[2] for r in ranks)
    return {
        **summarise(right),
        **what_reviews_say(right, changed, fresh),
        **several_samples(right, votes),
        **{f"length{k}": lengths[..., k - 1].mean().item() for k in range(1, turns + 1)},
        "truncated": truncated.mean().item(),
        "tokens": lengths.sum(-1).mean().item(),
        "undecided": undecided,
        "questions": len(problems),
        "samples": samples,
        "temperature": temperature,
    }


def by_turn(rows, samples):
    """[B] of each turn -> [B / samples, samples, turns] fp32."""
    return torch.stack([x.view(-1, samples).float() for x in rows], -1)


def summarise(right):
    """right: [Q, samples, turns] 0/1 -> {column: (mean, standard error over questions)}."""
    turns = right.shape[-1]
    columns = {f"t{k}": right[..., k - 1] for k in range(1, turns + 1)}
    if turns > 1:
        columns["delta"] = columns[f"t{turns}"] - columns["t1"]
    # Sample s of turn k corrects sample s of turn k - 1, so products of 0/1 are transitions.
    for k in range(2, turns + 1):
        before, after = columns[f"t{k - 1}"], columns[f"t{k}"]
        columns |= {f"fix{k}": (1 - before) * after, f"broke{k}": before * (1 - after)}
    # Over the samples first: what is left is one number a question, and questions are independent.
    return {name: mean_and_error(x.mean(1)) for name, x in columns.items()}


def what_reviews_say(right, changed, fresh):
    """[Q, samples, turns] 0/1 each -> {"no_right2", "no_wrong2", "fresh2", ...: (mean, error)}.

    A correction says no if it states another answer than the one before it. no_right: how often it
    does that to a right answer; no_wrong: to a wrong one; fresh: how many of these other answers
    stand nowhere above them. None for a mean of nothing.
    """
    found = {}
    for k in range(1, right.shape[-1]):
        before, no = right[..., k - 1], changed[..., k]
        found[f"no_right{k + 1}"] = share_and_error(no * before, before)
        found[f"no_wrong{k + 1}"] = share_and_error(no * (1 - before), 1 - before)
        found[f"fresh{k + 1}"] = share_and_error(fresh[..., k], no)
    return found


def several_samples(right, votes):
    """pass@k for k = 1, 2, 4, ..., n and maj@n of each turn; nothing for one sample.

    right: [Q, n, turns]; votes: [Q] lists with a value for each turn. -> {"pass1": {k: (mean,
    error)}, "maj1": (mean, error), "pass2": ...}.
    """
    n, found = right.shape[1], {}
    for turn in range(right.shape[-1] if n > 1 else 0):
        count = right[..., turn].sum(1).int().tolist()
        sizes = [k for k in (2**i for i in range(20)) if k < n] + [n]
        found[f"pass{turn + 1}"] = {
            k: mean_and_error(torch.tensor([pass_at(k, n, c) for c in count])) for k in sizes
        }
        found[f"maj{turn + 1}"] = mean_and_error(torch.tensor([vote[turn] for vote in votes]))
    return found


def pass_at(k, n, c):
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones:
    1 - C(n - c, k) / C(n, k), without bias (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(x):
    """Mean of a vector and its standard error, std / sqrt(n); None for the error of one number."""
    return x.mean().item(), (x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None)


def share_and_error(part, whole):
    """[Q, samples] each -> sum of `part` / sum of `whole`, and its standard error over questions.

    The error of a ratio, to first order: sqrt(sum of (part - share whole)² of a question) / sum of
    whole. (None, None) where `whole` is 0.
    """
    part, whole = part.sum(1), whole.sum(1)  # [Q]
    if not whole.sum():
        return None, None
    share = part.sum() / whole.sum()
    return share.item(), ((part - share * whole).norm() / whole.sum()).item()


def majorities(layers, samples):
    """-> for each question a list with maj@n of each turn (see `majority`)."""
    turns = []
    for layer in layers:
        answers, right = [stated[-1] for stated in layer.answers], layer.correct.tolist()
        groups = range(0, len(answers), samples)
        turns.append([majority(answers[i : i + samples], right[i : i + samples]) for i in groups])
    return [list(question) for question in zip(*turns)]


def majority(answers, right):
    """maj@n: the share of right answers among those with the most votes; 0 or 1 but for ties.

    Answers count as one if the verifier holds them equal. A response without an answer has no vote.
    """
    votes = {}  # answer: verdicts of all answers that are equal to it
    for answer, verdict in zip(answers, right):
        if answer:
            equals = (other for other in votes if agree(answer, other))
            known = answer if answer in votes else next(equals, answer)
            votes.setdefault(known, []).append(float(verdict))
    most = max(map(len, votes.values()), default=0)
    winners = [verdict for group in votes.values() if len(group) == most for verdict in group]
    return sum(winners) / max(len(winners), 1)


def agree(answer, other):
    """Whether two extracted answers count as one vote; without a verdict they are two."""
    try:
        return equal(answer, other)
    except VerifierFailed:
        return False


def as_metrics(results):
    """A result as fields of metrics.jsonl: {"heldout1", "heldout1_se", "heldout_fix2", ...}."""
    metrics = {}
    for k in range(1, turns_of(results) + 1):
        names = {f"t{k}": "heldout", f"fix{k}": "heldout_fix", f"broke{k}": "heldout_broke"}
        for column, name in names.items():
            if column in results:
                metrics[f"{name}{k}"], metrics[f"{name}{k}_se"] = results[column]
    return metrics


# ---- the table -----------------------------------------------------------------------------------


def percent(pair, sign=""):
    if pair[0] is None:
        return "-"
    error = "?" if pair[1] is None else f"{100 * pair[1]:.1f}"
    return f"{100 * pair[0]:{sign}.1f} ± {error}"


def columns(turns):
    """{column of a result: its title} of a table with so many turns."""
    shown = {f"t{k}": f"Acc@t{k}" for k in range(1, turns + 1)}
    if turns > 1:
        shown["delta"] = f"Δ(t1,t{turns})"
    for k in range(2, turns + 1):
        turn = f" t{k}" if turns > 2 else ""
        shown |= {f"fix{k}": f"Δ i→c{turn}", f"broke{k}": f"Δ c→i{turn}"}
    return shown


def turns_of(results):
    """How many turns a result, or several, have."""
    return sum(f"t{k}" in results for k in range(1, 100))


def table(rows, unit="held-out questions"):
    """{name: result of evaluate} -> the paper's table as text, in percent.

    With more than two turns what changed stands below, so that lines are not too long.
    """
    turns = min(turns_of(results) for results in rows.values())
    shown, lines = list(columns(turns).items()), []
    first = turns + 1 if turns > 2 else len(shown)
    for part, last in ((shown[:first], "questions"), (shown[first:], "")):
        if part:
            heads = "".join(f"{title:>15}" for _, title in part)
            lines.append(f"{'':24}{heads}{last:>12}".rstrip())
        for name, results in rows.items() if part else ():
            cells = [percent(results[key], "+" if key == "delta" else "") for key, _ in part]
            line = "".join(f"{cell:>15}" for cell in cells)
            count = f"{results['questions']:,}" if last else ""
            lines.append(f"{name:24}{line}{count:>12}".rstrip())
    return "\n".join([*lines, f"(percent ± standard error over {unit})"])


def details(rows, verifier):
    """More about each row: pass@k, maj@n, lengths, truncated answers, failures of the verifier."""
    lines = []
    for name, results in rows.items():
        turns = range(1, turns_of(results) + 1)
        for turn in turns if "pass1" in results else ():
            shares = [f"pass@{k} {percent(pair)}" for k, pair in results[f"pass{turn}"].items()]
            majority_of = f"maj@{results['samples']} {percent(results[f'maj{turn}'])}"
            lines.append(f"{name}, turn {turn}: {', '.join([*shares, majority_of])}")
        for turn in [turn for turn in turns if f"no_right{turn}" in results]:
            said = dict(right=f"no_right{turn}", wrong=f"no_wrong{turn}", fresh=f"fresh{turn}")
            said = {name: percent(results[key]) for name, key in said.items()}
            lines.append(
                f"{name}, turn {turn} changes {said['right']} of right answers, {said['wrong']} of "
                f"wrong ones; {said['fresh']} of its other answers are new"
            )
        lengths = " and ".join(f"{results[f'length{turn}']:.0f}" for turn in turns)
        lines.append(
            f"{name}: {lengths} tokens an answer, {100 * results['truncated']:.1f} % of answers "
            f"truncated; verifier {verifier}, {results['undecided']} undecided"
        )
    return "\n".join(lines)


# ---- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # A run's folder, its checkpoint.pt, a base, or a folder in Hugging Face's format.
    model: str = ""
    data: tuple[str, ...] = ()  # JSONL files of problems for a real model, separated by commas
    # How many; 0: all of a data set, 1,024 held-out ones of a built-in task.
    questions: Annotated[int, Between(0, 1 << 24)] = 0
    # Answers to a question; 1: no correction; 0: as many as the run trained, and at least 2.
    turns: Annotated[int, Between(0, 16)] = 0
    samples: Annotated[int, Between(1, 1 << 20)] = 1  # per question at --temperature
    temperature: Annotated[float, AtLeast(0)] = 1.0  # besides greedy; 0: greedy alone
    top_k: Annotated[int, AtLeast(0)] = 0  # draw from the k likeliest tokens only; 0: from all
    # ... from the fewest likeliest tokens whose probabilities sum to p
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    # ... from tokens at least p times as likely as the likeliest
    min_p: Annotated[float, AtLeast(0), Below(1)] = 0.0
    # Per answer; 0: as in training, else what fits into the context, at most 1,024.
    max_new_tokens: Annotated[int, AtLeast(0)] = 0
    seed: int = 0  # of the choice of questions and of the sampling
    json: str = ""  # also write the figures to this file
    transcripts: str = ""  # folder for a JSONL of every dialogue; empty: beside the model
    cache_tokens: Annotated[int, AtLeast(0)] = 0  # as in train.py
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: the faster one

    real: RealConfig = RealConfig(prompt_tokens=0)


def main():
    """Flags, the model, then a table for each set of questions."""
    config = parse_flags(Config, __doc__, renamed=RENAMED, first_word="model")
    if not config.model:
        raise BadInput("no model is named: name a run, say out/solve-mgrpo-0, as the first word")
    if config.questions == 1:
        raise BadInput("--questions 1: an accuracy with an error needs at least 2 (0: all)")
    if config.samples > 1 and not config.temperature:
        raise BadInput(
            f"--samples {config.samples} at --temperature 0 would be the same answer every time; "
            "raise the temperature"
        )
    if config.json:
        make_folder(Path(config.json).parent)  # now, not after hours
    config = replace(config, turns=config.turns or trained_turns(Path(config.model)))

    # Every data file is a set with a table of its own; a built-in task is a single set.
    policy, tasks = open_model_and_tasks(
        config.model,
        sets=[((), (file,)) for file in config.data],
        real=config.real,
        device=config.device,
        dtype=config.dtype,
        max_new_tokens=config.max_new_tokens,
        turns=config.turns,
        cache_tokens=config.cache_tokens,
    )
    sampler = make_sampler(policy, tasks, config.turns, config.cache_tokens)
    results = {}
    for task, name in zip(tasks, config.data or [str(tasks[0])]):
        results[name] = measure(config, policy, task, sampler)
        if config.json:  # after each, so that no figures are lost with the next set
            settings = flat(config) | dict(
                max_new_tokens=task.max_new_tokens,
                prompt_tokens=task.prompt_tokens,
                template=template_of(policy),
            )
            only = results[name] if len(tasks) == 1 else {}
            figures = dict(settings=settings, made_by=versions(), sets=results) | only
            write_json(config.json, figures)


def trained_turns(folder):
    """How many answers in a row the run in this folder trained, and at least 2."""
    if not (folder / "metrics.jsonl").exists():
        return 2
    settings = read_json(folder / "config.json", "a run has one")
    check_fields(settings, dict(group_sizes=tuple[int, ...]), folder / "config.json")
    return max(2, len(settings["group_sizes"]))


def measure(config, policy, task, sampler):
    """Asks the questions of a task -> {row: result}, greedy and at --temperature. Prints them."""
    problems = task.held_out(config.questions, config.seed)
    folder, prefix = policy.folder, policy.prefix
    about = dict(model=config.model, seed=config.seed)
    if config.transcripts:
        folder = Path(config.transcripts)
    dialogues = Dialogues(folder, f"{prefix}eval-{task.name}", about, extract_answer)
    filters = dict(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    rows = {}
    try:
        for name, options in {
            "greedy": dict(temperature=0.0),
            f"temperature {config.temperature:g}": dict(
                samples=config.samples, temperature=config.temperature, filters=filters
            ),
        }.items():
            if name == "greedy" or config.temperature:
                rows[name] = evaluate(
                    sampler,
                    task,
                    problems,
                    turns=config.turns,
                    seed=config.seed,
                    record=dialogues.record,
                    name=name,
                    **options,
                )
    finally:  # what was measured before Ctrl-C is shown all the same
        shown = "no table: interrupted"
        if rows:
            shown = f"{table(rows, task.unit)}\n{details(rows, config.real.verifier)}"
        print(f"\n{task.name}\n{shown}\n{', '.join(map(str, dialogues.paths))}: every dialogue")
    return rows


RENAMED = dict(
    checkpoint="name the model first: python eval.py out/run",
    init="name the model first: python eval.py out/run",
    quiet="TQDM_DISABLE=1 turns progress bars off",
)

if __name__ == "__main__":
    distributed.run(main)
