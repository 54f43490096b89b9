"""From flags to a run: what is checked, read and planned before any weights are loaded, so that
what is wrong is said at once.

The idea. train.py has the loop; this is what stands before it. `prepare` gives a Setup: the
settings with nothing left open, the tokenizer, the questions, the model's shape, a verifier, and a
function that loads the weights. There are two ways to one: a built-in task with its base
(`tiny_model`), and a model from --init with files of problems (`real_model`).
"""

import dataclasses
import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval import MOST, ROWS, check_cache, check_counts, make_verifier, max_new_tokens
from huggingface.prompts import model_folder, open_shape, open_weights
from huggingface.tokenizer import build_encoding
from huggingface.weights import library
from model import ModelConfig, load_checkpoint
from runtime import distributed, memory
from runtime.flags import BadInput, file_name, make_folder
from runtime.log import say
from tasks import base
from tasks.base import base_model, base_path, pick_device, resolve
from tasks.catalog import longest_phrase, task_of, token_limits
from tasks.files import DataSet, names


class Setup(NamedTuple):
    """What a run needs to know before any weights are there."""

    c: Any  # train.Config with nothing left open
    encoding: Any
    task: Any  # of tasks.py, or a data.DataSet
    shape: ModelConfig
    # (where a run that goes on had it from, if it does) -> the policy, where it came from
    load: Any
    verifier: Any


def validate(c):
    """BadInput for values that cannot work together, with the consequence and the way out."""
    least = dict.fromkeys(
        (
            "cache_tokens",
            "max_new_tokens",
            "lr",
            "kl_coef",
            "layer2_weight",
            "save_every",
            "resample",
            "look_questions",
            "eval_every",
            "transcripts",
        ),
        0,
    ) | dict(eval_questions=2)
    least |= dict.fromkeys(
        (
            "tokens",
            "prompts",
            "attempts",
            "corrections",
            "epochs",
            "minibatches",
            "tokens_per_microbatch",
            "keep",
            "prompt_tokens",
        ),
        1,
    )
    for name, smallest in least.items():
        if not smallest <= getattr(c, name) < math.inf:
            raise BadInput(
                f"--{name.replace('_', '-')} {getattr(c, name)}: must be a number of at least "
                f"{smallest}"
            )
    check_counts(
        dict(
            eval_questions=c.eval_questions,
            look_questions=c.look_questions,
            resample=c.resample,
            epochs=c.epochs,
        )
    )
    rows = c.prompts * c.attempts * (1 + c.corrections)
    if rows > MOST:
        raise BadInput(
            f"--prompts {c.prompts}, --attempts {c.attempts} and --corrections {c.corrections} "
            f"make {rows:,} rows a step: "
            f"lower them to {MOST:,} at most"
        )
    if c.layers not in (1, 2):
        raise BadInput(f"--layers {c.layers}: 1 is GRPO, 2 is MGRPO")
    if c.layers == 2 and c.corrections == 1 and c.group == "attempt" and c.failed != "raw":
        raise BadInput(
            "--corrections 1: an attempt's only correction has no siblings to be better than, so "
            "layer 2 would learn "
            "nothing; use --corrections 2 or more, --group question, or --failed raw"
        )
    if c.layers == 1 and c.attempts == 1:
        raise BadInput(
            "--attempts 1: a single answer has no siblings to be better than; use --attempts 2 or "
            "more"
        )
    if c.prompts % (c.minibatches * distributed.size()):
        among = f" on each of {distributed.size()} processes" if distributed.size() > 1 else ""
        raise BadInput(
            f"--prompts {c.prompts} does not divide into --minibatches {c.minibatches}{among}: "
            "choose a multiple of "
            f"{c.minibatches * distributed.size()}"
        )
    if c.failed == "raw" and c.group == "question":
        raise BadInput(
            "--failed raw takes the reward itself as advantage, so --group question would change "
            "nothing; drop one of them"
        )
    if not 0 < c.temperature < math.inf:
        raise BadInput(
            f"--temperature {c.temperature}: rollouts must be sampled; greedy ones are all alike "
            "and teach nothing"
        )
    if (
        c.compile
        and not torch.cuda.is_available()
        and not any(map(shutil.which, ("g++", "clang++")))
    ):
        raise BadInput(
            "--compile: torch.compile needs a C++ compiler here (g++ or clang++), and there is "
            "none; leave it out"
        )
    if c.look_questions == 1:
        raise BadInput(
            "--look-questions 1: an accuracy with an error needs at least 2 questions (or 0: no "
            "looks)"
        )
    if c.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise BadInput(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out "
            "(report.html has its curves)"
        )
    if not 0 <= c.format_weight <= 0.5:
        raise BadInput(
            f"--format-weight {c.format_weight} is not in [0, 0.5]: form could pay better than "
            "being right"
        )
    if not 0 < c.clip_low < 1 or not 0 < c.clip_high < math.inf:
        raise BadInput(
            f"--clip-low {c.clip_low} must lie in (0, 1) and --clip-high {c.clip_high} above 0"
        )
    file_name("name", c.name)


def method(c):
    return "MGRPO" if c.layers == 2 else "GRPO"


def prepare(c):
    """Checks the config and reads all but the weights, so that what is wrong is said at once ->
    Setup."""
    validate(c)
    measured, c = c.dtype == "auto" and pick_device(c.device) == "cpu", resolve(c)
    name = Path(os.path.abspath(c.init)).name if c.init else c.task
    c = dataclasses.replace(
        c,
        name=c.name or f"{name}-{method(c).lower()}-{c.seed}",
        recompute={"auto": "yes" if c.init else "no"}.get(c.recompute, c.recompute),
    )
    say(
        f"{c.device}, {c.dtype} compute over float32 "
        f"masters{' (measured to be the faster here)' if measured else ''}"
    )
    setup = (real_model if c.init else tiny_model)(c)
    check_cache(c.cache_tokens, row_tokens(setup))
    distributed.agree("settings", setup.c)
    distributed.agree(
        "questions to learn from",
        [problem.question for problem in getattr(setup.task, "splits", dict(train=()))["train"]],
    )
    say(str(setup.task))
    make_folder("out")
    return setup


def tiny_model(c):
    """A built-in task, and its base from out/ or yet to be made -> Setup."""
    task, encoding, longest = task_of(c), build_encoding(), token_limits(task_of(c))[1]
    if c.max_new_tokens > longest:
        raise BadInput(
            f"--max-new-tokens {c.max_new_tokens}: a question and two such completions may not fit "
            "the context of this task's "
            f"model; use at most {longest}, or 0 for that"
        )
    c = dataclasses.replace(c, max_new_tokens=c.max_new_tokens or longest)
    shape = base.shape_for(c, encoding, task)
    return Setup(c, encoding, task, shape, lambda began=None: base_of_rank0(c, shape, began), None)


def base_of_rank0(c, shape, began=None):
    """The base of a built-in task, made or found by rank 0, on every rank -> model, its path.

    began: of a run that goes on, the path of the base that it began with; "" if it needs none, and
    any model of this shape will do. BadInput when that base is not there and would not be made by
    this code.
    """
    if began == "" or distributed.rank():
        model, path = base.new_model(c, shape), began or ""
    elif began is None or str(base_path(base_config(c))) == began:
        model, _, path = base_model(base_config(c), say)
    else:
        try:
            model, path = load_checkpoint(began, getattr(torch, c.dtype), c.device)[0], began
        except (FileNotFoundError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise BadInput(
                f"{began}, the base that this run began with and that its KL term needs: {why}; "
                "this code would make "
                "another, so bring it back, or start a new run"
            ) from None
    return model if began == "" else distributed.broadcast(model), path


def real_model(c):
    """The model of --init with the questions of --data -> Setup."""
    folder = model_folder(c.init)
    shape, encoding = open_shape(folder, c.template)
    c = dataclasses.replace(
        c,
        max_new_tokens=max_new_tokens(shape, encoding, c.prompt_tokens, c.max_new_tokens),
        template=encoding.template_name,
    )
    task = DataSet(names(c.data), encoding, c.prompt_tokens, names(c.eval_data), say)
    library()  # missing? say so before the weights are needed
    load = lambda began=None: (
        open_weights(folder, shape, encoding, getattr(torch, c.dtype), c.device),
        c.init,
    )
    return Setup(c, encoding, task, shape, load, make_verifier(c.verifier))


def plan(setup, total):
    """memory.plan for the flags of a run on a device with `total` bytes."""
    c, shape, phrase = setup.c, setup.shape, longest_phrase(setup.encoding)
    prompt = c.prompt_tokens if c.init else shape.context - 2 * c.max_new_tokens - phrase
    return memory.plan(
        shape,
        compute=getattr(torch, c.dtype),
        prompts=c.prompts,
        group_sizes=group_sizes(c),
        prompt=prompt,
        completion=c.max_new_tokens,
        phrase=phrase,
        tokens_per_microbatch=c.tokens_per_microbatch,
        cache_tokens=c.cache_tokens,
        reference=c.kl_coef > 0,
        recompute=c.recompute == "yes",
        device=c.device,
        total=total,
        ranks=distributed.size(),
    )


def group_sizes(c):
    return (c.attempts, c.corrections)[: c.layers]


def row_tokens(setup):
    """Tokens of the longest row: prompt, two completions, a phrase."""
    c = setup.c
    return (
        c.prompt_tokens + 2 * c.max_new_tokens + longest_phrase(setup.encoding)
        if c.init
        else setup.shape.context
    )


def wanted_tokens(setup):
    """Tokens that a rollout would have cached at a time, or a batch of evaluation."""
    c = setup.c
    rollout = memory.cached_tokens(
        len(distributed.share(c.prompts)),
        group_sizes(c),
        c.prompt_tokens,
        c.max_new_tokens,
        longest_phrase(setup.encoding),
    )
    return max(rollout, min(c.eval_questions, ROWS) * row_tokens(setup)) if c.init else 0


later = memory.reserved


def base_config(c):
    """The part of a config that makes the base."""
    return base.Config(
        **{field.name: getattr(c, field.name) for field in dataclasses.fields(base.Config)}
    )
