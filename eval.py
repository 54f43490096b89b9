"""The paper's table for a model: how often the first answer is right, the second, and what the
second look changed.

    python eval.py --checkpoint out/solve-mgrpo-0/checkpoint.pt                            # a run on the built-in tasks
    python eval.py --init out/run --data math500.jsonl --samples 4 --temperature 0.7       # a run, or any model in Hugging Face's format

The idea. Every question is answered (turn 1), a guiding phrase is appended, and the model answers
again (turn 2). The columns are how often each turn is right, and how often the second look mends (Δ
i→c) and breaks (Δ c→i); tables.py has their definitions, and those of pass@k and maj@n with several
samples of a question.

Questions are held out: a task's cannot be drawn in training, and of a data set those that the run
was trained on are left out, and counted. Errors are standard errors over questions. Every dialogue
goes to a JSONL file, and report.html shows them with the table.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from huggingface.prompts import model_folder, open_shape, open_weights
from huggingface.tokenizer import build_encoding
from huggingface.weights import library
from mgrpo import Sampling, expand, second_look
from model import compute_dtype, load_checkpoint
from report import page
from reward import agree, extract_answer
from runtime import bars, distributed, memory
from runtime.flags import BadInput, check_fields, make_folder, parse_flags, ran_out, read_json
from runtime.log import say, versions, write_json
from runtime.transcripts import Dialogues
from sample import Sampler
from tables import details, several, summarise, table
from tasks.base import pick_device
from tasks.catalog import TASKS, draw, longest_phrase, prompts_and_golds, task_of, token_limits
from tasks.files import DataSet, names
from verifier.math_verify import MathVerify

ROWS = 1024  # sampled at a time
# questions, samples or rows that flags may ask for: more end in memory that runs out, or never
MOST = 1 << 24


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""  # the checkpoint.pt of a run, or a base-....pt of pretrain.py
    init: str = ""  # or a folder: a run's, or a model in Hugging Face's format
    # files of problems (data.py), separated by commas, for a model that is not of the built-in
    # tasks
    data: str = ""
    questions: int = 0  # how many; 0: all of a data set, 1,024 of a task's held-out ones
    samples: int = 1  # answers sampled per question at --temperature (greedy needs one)
    temperature: float = 1.0  # besides greedy, which is always shown; 0: greedy alone
    top_k: int = 0  # at --temperature, draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # ... from the fewest likeliest whose probabilities sum to p
    min_p: float = 0.0  # ... from those at least p times as likely as the likeliest
    turns: Literal["1", "2"] = "2"  # 1 skips the second look
    # per answer; 0: as in training, else what fits twice into the context, at most 1,024
    max_new_tokens: int = 0
    # questions whose prompt is longer are left out; 0: as in training, else 512
    prompt_tokens: int = 0
    # of prompts (prompts.py); auto: the model's own
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"
    # who says what is right: reward.py, or that library
    verifier: Literal["rules", "math-verify"] = "rules"
    # tokens whose keys and values the sampler may hold; 0: no limit on a CPU, half of the free
    # memory on CUDA
    cache_tokens: int = 0
    seed: int = 0  # of the questions of a task and of the sampling
    json: str = ""  # also write the figures to this file
    transcripts: str = ""  # folder for a JSONL of every transcript; empty: beside the model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute type; auto: the faster one, measured
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quiet: bool = False  # no bars


@functools.lru_cache(4)
def held_out_questions(task, count, seed=0):
    """`count` DIFFERENT held-out problems; fewer, and said, when 20 x count draws do not bring as
    many (Countdown has few). Of a data set 0 is all."""
    if isinstance(task, DataSet):
        return task.some("held out", count, seed)
    found = {}
    for index in range(20 * count):
        problem = draw(task, "held out", seed, index)
        found.setdefault(task.canonical(problem), problem)
        if len(found) == count:
            break
    if len(found) < count:
        say(
            f"held out: {len(found):,} different questions are asked, not {count:,}: this task has "
            "hardly more"
        )
    return list(found.values())


# ---- measuring -----------------------------------------------------------------------------------


def two_turns(sampler, encoding, problems, how, samples=1, turns=2):
    """-> [layer 1] or [layer 1, layer 2]: `samples` answers to each problem, and one second look at
    each answer."""
    prompts, golds = prompts_and_golds(encoding, problems)
    layers = [expand(sampler, encoding, golds, prompts, samples, how)]
    return layers + (
        [second_look(sampler, encoding, golds, layers[0], 1, how)] if turns == 2 else []
    )


def evaluate(
    sampler,
    encoding,
    problems,
    max_new_tokens,
    *,
    temperature=0.0,
    samples=1,
    turns=2,
    seed=0,
    filters=None,
    verifier=None,
    record=None,
    say="evaluating",
):
    """-> {"t1": (mean, standard error), ..., "pass": {k: ...}, "maj": ..., "cut": share, "tokens":
    mean of both turns together, "length1", "length2", "undecided": verifier's failures,
    "questions", "samples", "temperature"}, of all ranks' shares of the questions together.
    record(problems, layers, how) sees every batch of this rank's."""
    distributed.agree("questions to be asked", [problem.question for problem in problems])
    parts, votes, undecided, at_once, mine = (
        [],
        [],
        0,
        max(1, ROWS // samples),
        distributed.share(len(problems)),
    )
    with bars.rows_of(sampler, len(mine) * samples * turns, say):
        for start in range(mine.start, mine.stop, at_once):
            batch = problems[start : min(start + at_once, mine.stop)]
            how = Sampling(
                max_new_tokens,
                temperature,
                seed,
                first_row=start * samples,
                filters=filters or {},
                verifier=verifier,
            )
            layers = two_turns(sampler, encoding, batch, how, samples, turns)
            shape = len(batch), samples
            parts.append(
                [
                    torch.stack([x.view(shape).float() for x in column], -1)
                    for column in zip(
                        *[
                            (layer.correct, ~layer.completions.ended.cpu(), layer.lengths)
                            for layer in layers
                        ]
                    )
                ]
            )
            undecided += sum(int(layer.undecided.sum()) for layer in layers)
            votes += majorities(layers, samples) if samples > 1 else []
            if record:
                record(batch, layers, how)
    parts, votes, undecided = (
        sum(found, type(found[0])()) for found in zip(*distributed.everyone((parts, votes, undecided)))
    )
    right, cut, tokens = (torch.cat(column) for column in zip(*parts))  # [Q, samples, turns] each
    lengths = {f"length{turn + 1}": tokens[..., turn].mean().item() for turn in range(turns)}
    return (
        summarise(right)
        | several(right, votes)
        | lengths
        | dict(
            cut=cut.mean().item(),
            tokens=tokens.sum(-1).mean().item(),
            undecided=undecided,
            questions=len(problems),
            samples=samples,
            temperature=temperature,
        )
    )


def majorities(layers, samples):
    """For each question a list with maj@n of each turn (see `majority`)."""
    turns = []
    for layer in layers:
        answers, right = [extract_answer(text) for text in layer.texts], layer.correct.tolist()
        turns.append(
            [
                majority(answers[i : i + samples], right[i : i + samples])
                for i in range(0, len(answers), samples)
            ]
        )
    return [list(question) for question in zip(*turns)]


def majority(answers, right):
    """Share of right ones among the answers that got the most votes: 0 or 1 but for ties. What gave
    no answer has no vote."""
    votes = {}
    for answer, verdict in zip(answers, right):
        if answer:
            known = (
                answer
                if answer in votes
                else next((other for other in votes if agree(answer, other)), answer)
            )
            votes.setdefault(known, []).append(float(verdict))
    most = [
        verdict
        for verdicts in votes.values()
        if len(verdicts) == max(map(len, votes.values()))
        for verdict in verdicts
    ]
    return sum(most) / max(len(most), 1)


# ---- opening -------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What is evaluated, and on what."""

    model: Any
    encoding: Any
    sets: dict  # name: task of tasks.py or data.DataSet
    max_new_tokens: int
    row_tokens: int  # of the longest row: prompt, two completions, a phrase
    folder: Path  # for transcripts
    prefix: str  # of their names


def load_policy(path, dtype, device):
    """-> (model, the config it was trained with as a dict). BadInput for what is not a checkpoint
    of a run or a base."""
    if not path:
        raise BadInput(
            "--checkpoint is missing: name the checkpoint.pt of a run, say "
            "out/solve-mgrpo-0/checkpoint.pt, or a folder with "
            "--init"
        )
    device = pick_device(device)
    try:
        model, extra = load_checkpoint(path, compute_dtype(dtype, device), device)
    except FileNotFoundError:
        raise BadInput(
            f"--checkpoint {path}: there is no such file; `python train.py` makes "
            "out/<run>/checkpoint.pt"
        ) from None
    except ValueError as error:
        raise BadInput(f"--checkpoint {error}") from None
    if "config" not in extra:
        raise BadInput(f"--checkpoint {path} does not say its task")
    trained, kinds = (
        extra["config"],
        dict.fromkeys(("candidates", "operations", "modulus", "numbers"), int),
    )
    check_fields(
        trained,
        dict(task=Literal[tuple(TASKS)]) | kinds,
        f"--checkpoint {path}: what it was trained on",
    )
    check_limits(trained, f"--checkpoint {path}")
    try:
        task_of(trained)
    except BadInput as error:
        raise BadInput(f"--checkpoint {path}: what it was trained on: {error}") from None
    if build_encoding().max_token_value >= model.config.vocab_size:
        raise BadInput(
            f"--checkpoint {path}: its vocabulary of {model.config.vocab_size} is not that of the "
            "built-in tasks"
        )
    return model, trained


def check_limits(trained, where, needed=()):
    """BadInput unless a run's config has, of the fields that eval.py and chat.py take from it,
    those `needed`, and no nonsense in any."""
    kinds = dict(prompt_tokens=int, max_new_tokens=int, data=str, eval_data=str)
    check_fields(
        trained,
        {name: kind for name, kind in kinds.items() if name in trained or name in needed},
        where,
    )
    if trained.get("prompt_tokens", 1) < 1 or trained.get("max_new_tokens", 0) < 0:
        raise BadInput(f"{where}: prompt_tokens must be at least 1, and max_new_tokens at least 0")


def run_config(run, needed):
    """config.json of a run on data sets, as a dict that has the fields `needed`."""
    trained = read_json(run / "config.json", "a run has one")
    check_limits(trained, run / "config.json", needed)
    return trained


def open_subject(c):
    """The model of --checkpoint or --init with the questions it is asked -> Subject. BadInput for
    what is neither."""
    folder = Path(c.init)
    if not c.init or (folder / "checkpoint.pt").exists():
        for name in ("data", "template", "verifier", "prompt_tokens"):
            if getattr(c, name) != getattr(Config, name):
                raise BadInput(
                    f"--{name.replace('_', '-')}: this model was trained on a built-in task, and "
                    "knows no other; leave it out"
                )
        path = Path(c.checkpoint or folder / "checkpoint.pt") if c.checkpoint or c.init else ""
        model, trained = load_policy(path, c.dtype, c.device)
        task = task_of(trained)
        prefix = "" if path.name == "checkpoint.pt" else f"{path.stem}-"
        question, completion = token_limits(task)
        new = c.max_new_tokens or trained.get("max_new_tokens") or completion
        if question + 2 * new + longest_phrase(build_encoding()) > model.config.context:
            raise BadInput(
                f"--checkpoint {path}: a question of {question} tokens, twice {new} for answers "
                "and a phrase exceed its model's "
                f"context of {model.config.context}; lower --max-new-tokens"
            )
        check_cache(c.cache_tokens, model.config.context)
        return Subject(
            model,
            build_encoding(),
            {str(task): task},
            new,
            model.config.context,
            path.parent,
            prefix,
        )
    if not c.data:
        raise BadInput(
            "--data is missing: a real model is asked questions of files, say --data "
            "gsm8k/test.jsonl (data.py)"
        )
    return real_subject(c, folder)


def real_subject(c, folder):
    """A folder in Hugging Face's format, or that of a run, with data sets -> Subject. The weights
    come last: what is wrong with the rest is said before."""
    path = model_folder(folder)
    # out/run and out/run/model
    run = next(
        (parent for parent in (path.parent, folder) if (parent / "metrics.jsonl").exists()), None
    )
    trained = (
        run_config(run, ("data", "eval_data", "prompt_tokens", "max_new_tokens")) if run else {}
    )
    shape, encoding = open_shape(path, c.template)
    prompt_tokens = c.prompt_tokens or trained.get("prompt_tokens", 512)
    new = max_new_tokens(
        shape, encoding, prompt_tokens, c.max_new_tokens or trained.get("max_new_tokens", 0)
    )
    known = learnt_questions(trained, encoding)
    sets = {
        name: DataSet([], encoding, prompt_tokens, [name], print, known) for name in names(c.data)
    }
    row = prompt_tokens + 2 * new + longest_phrase(encoding)
    check_cache(c.cache_tokens, row)
    library()  # missing? say so before the weights are needed
    device = pick_device(c.device)
    model = open_weights(
        path, shape, encoding, distributed.from_rank0(lambda: compute_dtype(c.dtype, device)), device
    )
    return Subject(
        model,
        encoding,
        sets,
        new,
        row,
        run or Path("out"),
        "" if run else f"{folder.resolve().name}-",
    )


def learnt_questions(trained, encoding):
    """The questions that a run with this config drew from, so that it is not asked what it has
    learnt; none for what is no run's."""
    if not trained:
        return frozenset()
    files = [name for field in ("data", "eval_data") for name in names(trained[field])]
    if not all(Path(name).exists() for name in files):
        print(
            f"data: the run was trained on {trained['data']}, which is not there now: whether it "
            "knows these questions cannot be said"
        )
        return frozenset()
    learnt = DataSet(
        names(trained["data"]),
        encoding,
        trained["prompt_tokens"],
        names(trained["eval_data"]),
        say=lambda text: None,
    )
    return frozenset(learnt.canonical(problem) for problem in learnt.splits["train"])


def max_new_tokens(shape, encoding, prompt_tokens, asked):
    """Tokens of a completion such that a prompt, two of them and a phrase fit the model's context;
    `asked` if that fits, at most 1,024 if nothing is asked. BadInput otherwise."""
    phrase = longest_phrase(encoding)
    room = (shape.context - prompt_tokens - phrase) // 2
    if room < 1 or asked > room:
        raise BadInput(
            f"--prompt-tokens {prompt_tokens} and twice --max-new-tokens {asked or 1} do not fit "
            "the model's context of "
            f"{shape.context} with a phrase of {phrase}; lower one of them (completions may have "
            f"{max(room, 0)} here)"
        )
    return asked or min(1024, room)


def check_counts(counts):
    """BadInput for a {field: value} above MOST."""
    for name, value in counts.items():
        if value > MOST:
            raise BadInput(f"--{name.replace('_', '-')} {value}: at most {MOST:,}")


def check_cache(cache_tokens, row):
    """BadInput for a --cache-tokens that does not hold a row of `row` tokens."""
    if 0 < cache_tokens < row:
        raise BadInput(
            f"--cache-tokens {cache_tokens}: a row may need {row}; use that or more, or 0"
        )


def make_sampler(model, cache_tokens, row, wanted=0, reserved=0):
    """A sampler whose cache holds at least one row of `row` tokens (`check_cache`). wanted: tokens
    that a call would have cached; if a CPU has no room for them rows wait their turn, in one
    process. reserved: bytes of CUDA memory that the cache must leave to others."""
    check_cache(cache_tokens, row)
    if not cache_tokens and model.embed.weight.device.type == "cpu":
        room = memory.cache_room(model.config, model.compute)
        cache_tokens = max(room, row) if wanted > room else 0
    return Sampler(model, cache_tokens=cache_tokens, reserved=reserved)


def make_verifier(name):
    """None for our own rules, or the library's."""
    return MathVerify() if name == "math-verify" else None


def validate(c):
    if (
        (c.questions != 0 and c.questions < 2)
        or c.samples < 1
        or not 0 <= c.temperature < math.inf
        or c.cache_tokens < 0
    ):
        raise BadInput(
            "--questions must be at least 2 (or 0: all), --samples at least 1, --temperature and "
            "--cache-tokens at least 0"
        )
    check_counts(dict(questions=c.questions, samples=c.samples))
    if c.top_k < 0 or not 0 < c.top_p <= 1 or not 0 <= c.min_p < 1:
        raise BadInput(
            "--top-k must be at least 0, --top-p above 0 and at most 1, --min-p at least 0 and "
            "below 1"
        )
    if c.max_new_tokens < 0 or c.prompt_tokens < 0:
        raise BadInput("--max-new-tokens and --prompt-tokens must be at least 0")
    if c.init and c.checkpoint:
        raise BadInput("--checkpoint and --init both name a model: use one")
    if c.samples > 1 and not c.temperature:
        raise BadInput(
            f"--samples {c.samples} at --temperature 0 would be the same answer every time; raise "
            "the temperature"
        )


def measure(c, subject, name, task, sampler, verifier):
    """A set of questions -> the rows of its table, greedy and at the temperature asked for, and the
    files of its dialogues."""
    problems = held_out_questions(
        task, c.questions or (0 if isinstance(task, DataSet) else 1024), c.seed
    )
    real, path = isinstance(task, DataSet), Path(name)
    # gsm8k-test
    label = (
        "-".join(filter(None, (path.parent.name, path.stem)))
        if real
        else type(task).__name__.lower()
    )
    about = dict(model=c.init or c.checkpoint, seed=c.seed)
    dialogues = Dialogues(
        Path(c.transcripts) if c.transcripts else subject.folder,
        f"{subject.prefix}eval-{label}",
        about,
        extract_answer,
    )
    ask = functools.partial(
        evaluate,
        sampler,
        subject.encoding,
        problems,
        subject.max_new_tokens,
        turns=int(c.turns),
        seed=c.seed,
        verifier=verifier,
        record=dialogues.record,
    )
    rows, what = {}, "questions" if real else "held-out questions"
    try:
        rows["greedy"] = ask()
        if c.temperature:
            filters = dict(top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)
            rows[f"temperature {c.temperature:g}"] = ask(
                samples=c.samples, temperature=c.temperature, filters=filters
            )
    finally:  # what was measured before Ctrl-C is shown all the same
        shown = (
            f"{table(rows, what)}\n{details(rows, c.verifier)}\n"
            if rows
            else "no table: interrupted\n"
        )
        print(
            f"\n{name}\n{shown}{', '.join(map(str, dialogues.paths))}: every "
            f"transcript{'' if rows else ' so far'}"
        )
    return rows, dialogues.paths


def main():
    """Flags, the model, a table for each set of questions."""
    c = parse_flags(Config, __doc__)
    validate(c)
    if c.json:
        make_folder(Path(c.json).parent)  # now, not after hours
    bars.quieten(c.quiet)
    verifier, results, paths = make_verifier(c.verifier), {}, []
    try:
        subject = open_subject(c)
        print(f"{c.init or c.checkpoint}: {', '.join(subject.sets)}")
        sampler = make_sampler(
            subject.model, c.cache_tokens, subject.row_tokens, ROWS * subject.row_tokens
        )
        template = getattr(subject.encoding, "template_name", "")
        settled = dataclasses.asdict(c) | dict(
            max_new_tokens=subject.max_new_tokens, template=template
        )
        for name, task in subject.sets.items():
            results[name], dialogues = measure(c, subject, name, task, sampler, verifier)
            paths += dialogues
            if c.json:  # after each, so that no set's figures are lost with the next
                flat = results[name] if len(subject.sets) == 1 else {}
                write_json(c.json, dict(settings=settled, made_by=versions(), sets=results) | flat)
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise BadInput(
                f"out of memory ({str(error).split('.')[0]}): lower --cache-tokens, "
                "--max-new-tokens or --samples"
            ) from None
        raise
    page.at_the_end(subject.folder, print, paths, bool(c.transcripts))


if __name__ == "__main__":
    distributed.run(main)
