"""From flags to a policy and a task: the one way to open a model, for training, eval and chat.

A policy is model.GPT. It comes from one of three places:

    nothing              the base model of a built-in task, made now or reused from out/ (base.py)
    a run or checkpoint  out/solve-mgrpo-0, or its checkpoint.pt, or out/base-....pt
    a Hugging Face model a folder with config.json, safetensors and a tokenizer; or a run's model/

Everything that can be wrong with flags, files and tokenizer is found before the weights are read.
"""

import copy
import os
import time
from dataclasses import fields
from pathlib import Path

from engine.workers import in_parallel
from huggingface.prompts import RealConfig, model_folder, open_shape, open_weights
from huggingface.weights import library, save_model
from mgrpo import longest_phrase
from model import GPT
from runtime import distributed, memory
from runtime.checkpoints import load_checkpoint, save_checkpoint, weights_checksum
from runtime.device import Hardware as Hardware  # train.py takes all groups of flags from here
from runtime.device import compute_dtype, pick_device
from runtime.flags import BadInput, check_fields, flag_name, kinds, make_folder, read_json
from runtime.log import say
from sample import Sampler, narrow_copy
from tasks.base import (
    BaseConfig,
    base_model,
    base_path,
    base_shape,
    new_model,
    pick_preset,
    preset_name,
)
from tasks.catalog import TaskConfig, make_task
from tasks.files import DataSet, make_verifier

NEW_TOKENS = 1024  # of a real model's completion, unless asked otherwise
PROMPT_TOKENS = 512  # of a real model's prompt, unless asked otherwise
EVALUATED_ROWS = 1024  # that eval.py samples at a time


def open_model_and_task(model="", *, data=(), eval_data=(), **options):
    """-> policy, task. For the options see `open_model_and_tasks`.

    data: files to train on; eval_data: files to evaluate on. Both are for real models.
    """
    policy, tasks = open_model_and_tasks(model, sets=[(data, eval_data)], **options)
    return policy, tasks[0]


def open_model_and_tasks(
    model="",
    *,
    sets=(),
    weights=True,
    puzzle=TaskConfig(),
    base=BaseConfig(),
    real=RealConfig(),
    device="auto",
    dtype="auto",
    max_new_tokens=0,
    turns=2,
    cache_tokens=0,
    say=say,
):
    """-> policy (model.GPT), [task, ...] (see tasks/problems.py).

    model: see this file's docstring. sets: (files to train on, files to evaluate on) of each task;
    a built-in task takes none. weights: False makes a model without reading weights, for a run
    whose weights are elsewhere. puzzle, base: of a base. real: of a Hugging Face model. turns:
    answers in a row that must fit the context, and into cache_tokens of KV cache (0: no limit).
    say: prints a line. BadInput names what is wrong and the remedy.

    The policy has `origin` (where it came from), `seconds` (that this took), and `folder` and
    `prefix` for files about it.
    """
    clock, device = time.time(), pick_device(device)
    # Rank 0 measures for all: ranks must not compute in different types.
    measured = dtype == "auto" and device == "cpu"
    dtype = distributed.broadcast_object(lambda: compute_dtype(dtype, device))
    path = Path(model)
    # A run's folder stands for its model.
    if (path / "checkpoint.pt").exists():
        path = path / "checkpoint.pt"
    if not model:
        refuse_real_flags(sets, real, "without a model there is")
        task = make_task(puzzle, max_new_tokens)
        check_looks(task, turns)
        check_cache(cache_tokens, task, turns)
        policy, tasks = open_base(task, puzzle, base, device, dtype, weights, say), [task]
    elif path.is_file():
        refuse_real_flags(sets, real, f"{path} was trained on")
        policy, task = open_checkpoint(path, device, dtype, max_new_tokens)
        check_looks(task, turns)
        check_cache(cache_tokens, task, turns)
        tasks = [task]
    else:
        policy, tasks = open_real(
            path, sets, real, device, dtype, max_new_tokens, turns, cache_tokens, weights, say
        )
    note = " (measured to be the faster here)" if measured else ""
    say(f"{device}, {str(dtype).removeprefix('torch.')} compute over float32 masters{note}")
    for task in tasks:
        # Other files or other code on a machine show in the first questions.
        distributed.agree("questions", [p.question for p in task.held_out(16)])
        say(str(task))
    policy.seconds = time.time() - clock
    return policy, tasks


def refuse_real_flags(sets, real, subject):
    """BadInput for flags of real models given with a model of a built-in task."""
    given = [f.name for f in fields(real) if getattr(real, f.name) not in (f.default, 0)]
    given += ["data"] * any(files for both in sets for files in both)
    if given:
        raise BadInput(
            f"{flag_name(given[0])}: {subject} a built-in task, which has its own; leave it out"
        )


# ---- the three places ----------------------------------------------------------------------------


def open_base(task, puzzle, base, device, dtype, weights, say):
    """The base model of a built-in task; rank 0 makes or finds it -> policy."""
    # (A run that is resumed has its weights in its state, so the file may be gone.)
    if base.start and (weights or Path(base.start).exists()):
        policy, other = open_checkpoint(Path(base.start), device, dtype, 0)
        if other.puzzle != task.puzzle:
            raise BadInput(
                f"--start {base.start} was trained on {other}, and this run is on {task}: give the "
                "flags of that task"
            )
        return policy
    name = str(dtype).removeprefix("torch.")
    make_folder("out")  # not writable? found before the base is made
    path = base_path(puzzle, base, device, name)
    # The other ranks make an empty model of the same shape, and `broadcast` fills it.
    if weights and distributed.rank() == 0:
        policy, _, path = base_model(puzzle, base, device, name, say)
    else:
        shape = base_shape(task, base)
        policy = new_model(shape, base.base_seed, device, name)
    if weights:
        distributed.broadcast(policy)
    policy.origin, policy.folder, policy.prefix = str(path), path.parent, f"{path.stem}-"
    return policy


def open_checkpoint(path, device, dtype, max_new_tokens):
    """The checkpoint.pt of a run on a built-in task, or a base -> policy, task."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        policy, extra = load_checkpoint(path, dtype, device)
    except FileNotFoundError:
        raise BadInput(
            f"{path}: there is no such file; `python train.py` makes out/<run>"
        ) from None
    except ValueError as error:
        raise BadInput(str(error)) from None
    where = f"{path}: what it was trained on"
    if "config" not in extra:
        raise BadInput(f"{path} does not name its task: it is no checkpoint of a run or a base")
    check_fields(extra["config"], kinds(TaskConfig) | dict(max_new_tokens=int), where)
    settings = {field.name: extra["config"][field.name] for field in fields(TaskConfig)}
    try:
        puzzle = TaskConfig(**settings)
        longest = make_task(puzzle).max_new_tokens
        # As long as in training, unless the flag asks for another length.
        trained = min(extra["config"]["max_new_tokens"], longest)
        task = make_task(puzzle, max_new_tokens or max(trained, 0))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if task.encoding.max_token_value >= policy.config.vocab_size:
        raise BadInput(
            f"{path}: its vocabulary of {policy.config.vocab_size} is not that of the built-in "
            "tasks"
        )
    # More turns than it was trained with need a longer context.
    if policy.config.context < base_shape(task, BaseConfig()).context:
        raise BadInput(
            f"{path}: its context of {policy.config.context} tokens does not hold the longest "
            "dialogue of its task"
        )
    policy.origin, policy.folder = str(path), path.parent
    policy.prefix = "" if path.name == "checkpoint.pt" else f"{path.stem}-"
    return policy, task


def open_real(folder, sets, real, device, dtype, max_new_tokens, turns, cache_tokens, weights, say):
    """A folder in Hugging Face's format, or a run that has one as its model/ -> policy, tasks."""
    path = model_folder(folder)
    # out/run and out/run/model: a run knows its own prompts and completions.
    runs = [parent for parent in (path.parent, folder) if (parent / "metrics.jsonl").exists()]
    trained = run_settings(runs[0]) if runs else {}
    # Flags, tokenizer and data first: weights of gigabytes are read when all else fits.
    shape, encoding = open_shape(path, real.template)
    prompt_tokens = real.prompt_tokens or trained.get("prompt_tokens", PROMPT_TOKENS)
    new_tokens = fitting_new_tokens(
        shape,
        prompt_tokens,
        longest_phrase(encoding),
        max_new_tokens or trained.get("max_new_tokens", 0),
        turns,
    )
    if not sets:
        raise BadInput("--data is missing: give files of questions, say --data gsm8k/test.jsonl")
    known = trained_on(trained, encoding, say)
    tasks = [
        DataSet(
            paths,
            encoding,
            prompt_tokens,
            held_out,
            max_new_tokens=new_tokens,
            verifier=make_verifier(real.verifier),
            known=frozenset() if paths else known,
            say=say,
        )
        for paths, held_out in sets
    ]
    for task in tasks:
        check_cache(cache_tokens, task, turns)
    library()  # missing? found before the weights are needed
    if weights:
        policy = open_weights(path, shape, encoding, dtype, device)
    else:
        policy = GPT(shape, dtype).to(device)
        policy.prompt_template, policy.source = encoding.template_name, path
    policy.origin, policy.folder = str(folder), runs[0] if runs else Path("out")
    policy.prefix = "" if runs else f"{folder.resolve().name}-"
    return policy, tasks


def run_settings(run):
    """config.json of a run on data sets, as a dict whose fields were checked."""
    path = run / "config.json"
    settings = read_json(path, "a run has one")
    wanted = dict(
        prompt_tokens=int, max_new_tokens=int, data=tuple[str, ...], eval_data=tuple[str, ...]
    )
    check_fields(settings, wanted, path)
    if settings["prompt_tokens"] < 1 or settings["max_new_tokens"] < 0:
        raise BadInput(f"{path}: prompt_tokens must be at least 1, and max_new_tokens at least 0")
    return settings


def trained_on(settings, encoding, say):
    """The canonical questions that a run with these settings trained on; none for a model that is
    no run's. Evaluation leaves them out."""
    if not settings:
        return frozenset()
    data, eval_data = settings["data"], settings["eval_data"]
    if not all(os.path.exists(name) for name in [*data, *eval_data]):
        say(
            f"data: the run was trained on {', '.join(data)}, which is not there now: questions "
            "that it knows cannot be left out"
        )
        return frozenset()
    quiet = lambda text: None
    trained = DataSet(data, encoding, settings["prompt_tokens"], eval_data, say=quiet)
    return frozenset(trained.canonical(problem) for problem in trained.splits["train"])


def fitting_new_tokens(shape, prompt_tokens, phrase, asked, turns):
    """Tokens of a completion such that a prompt, `turns` of them and the phrases fit the context.

    -> `asked` if that fits; what fits, at most NEW_TOKENS, for 0. BadInput if it does not fit.
    """
    # A context of 4,096, a prompt of 512, two turns with a phrase of 24 between them leave
    # (4096 - 512 - 24) // 2 = 1,780 tokens for each completion.
    room = (shape.context - prompt_tokens - (turns - 1) * phrase) // turns
    if room < max(asked, 1):
        raise BadInput(
            f"--prompt-tokens {prompt_tokens} and {turns} times --max-new-tokens {asked or 1} do "
            f"not fit the model's context of {shape.context}, with {turns - 1} phrases of "
            f"{phrase}: lower one of them (completions may have {max(room, 0)} here)"
        )
    return asked or min(NEW_TOKENS, room)


# ---- what goes with a policy ---------------------------------------------------------------------


def row_tokens(task, turns):
    """Tokens of the longest row of a task with so many answers."""
    phrase = longest_phrase(task.encoding)
    return memory.row_tokens(turns, task.prompt_tokens, task.max_new_tokens, phrase)


def check_looks(task, turns):
    """BadInput for more answers in a row than the texts of a task's base have."""
    if task.looks and turns > task.looks:
        raise BadInput(
            f"{turns} answers in a row: the base's texts have {task.looks}, and one answer beyond "
            f"them its accuracy collapses; ask for at most {task.looks}, or make a base with "
            f"--looks {turns}"
        )


def check_cache(cache_tokens, task, turns):
    """BadInput unless the longest row fits a KV cache of so many tokens (0: no limit)."""
    longest = row_tokens(task, turns)
    if 0 < cache_tokens < longest:
        raise BadInput(
            f"--cache-tokens {cache_tokens}: a row may need {longest}; use that or more, or 0"
        )


def make_sampler(policy, tasks, turns, cache_tokens=0, rollout_tokens=0, reserved=0):
    """A Sampler whose KV cache holds at least one row of each task.

    cache_tokens: the flag, 0 for no limit. A CPU without room for what a rollout (rollout_tokens)
    or a batch of evaluation would have cached gets a limit too, and rows wait their turn. reserved:
    bytes of CUDA memory that the cache must leave free.
    """
    longest = max(row_tokens(task, turns) for task in tasks)
    if not cache_tokens and policy.cos.device.type == "cpu":
        room = memory.cache_room(policy.config, policy.compute)
        wanted = max(rollout_tokens, EVALUATED_ROWS * longest)
        # A row must fit whole, even where that is more than the room.
        cache_tokens = max(room, longest) if wanted > room else 0
    return in_parallel(Sampler(policy, cache_tokens=cache_tokens, reserved=reserved))


def training_sampler(config, policy, task, turns, reference=None):
    """-> the Sampler of a training run, and the plan of its memory, {part: bytes}, printed.

    config: train.Config with nothing left open. reference: the type that one is held in, if any.
    """
    hardware, total = config.hardware, memory.available(config.hardware.device)
    lengths = dict(
        group_sizes=config.group_sizes,
        prompt=task.prompt_tokens,
        completion=task.max_new_tokens,
        phrase=longest_phrase(task.encoding),
    )
    plan = memory.plan(
        policy.config,
        compute=policy.compute,
        prompts=config.prompts,
        tokens_per_microbatch=hardware.tokens_per_microbatch,
        cache_tokens=hardware.cache_tokens,
        reference=reference,
        recompute=hardware.recompute == "yes",
        device=hardware.device,
        total=total,
        ranks=distributed.size(),
        **lengths,
    )
    say(memory.plan_text(plan, total))
    # The rollout of this rank alone.
    share = len(distributed.share(config.prompts))
    rollout_tokens = memory.cached_tokens(share, **lengths, device=hardware.device)
    # What a step takes besides comes after the sampler has measured how much memory is free.
    reserved = memory.reserved(plan)
    cache_tokens = hardware.cache_tokens
    return make_sampler(policy, [task], turns, cache_tokens, rollout_tokens, reserved), plan


def make_reference(policy, follows=False):
    """A copy of the policy, for a KL term or a method that looks at it, with the `checksum` of its
    weights.

    In the compute type, because every use would cast it anyway; in fp32 if it `follows` the policy:
    bf16 would round its small steps away.
    """
    reference = copy.deepcopy(policy) if follows else narrow_copy(policy)
    reference.follows = follows
    reference.checksum = weights_checksum(policy)
    return reference


def template_of(policy):
    """The prompt template of a real model, as --template names it; "auto" for a built-in task's."""
    return getattr(policy, "prompt_template", RealConfig.template)


def save_policy(policy, folder, weights, settings):
    """Saves the model of a run as it came: a built-in task's as checkpoint.pt, a real one in
    Hugging Face's format. weights: whole, {name: tensor}; settings: the run's, a flat dict."""
    if hasattr(policy, "prompt_template"):
        save_model(policy, folder / "model", policy.compute, weights)
    else:
        save_checkpoint(folder / "checkpoint.pt", policy, weights, config=settings)


# ---- presets -------------------------------------------------------------------------------------


def preset(given, presets):
    """{flag: value} of the command line -> its preset's values, of the base and in `presets`."""
    name = preset_name(given.get("preset", "auto"), given.get("device", "auto"))
    return pick_preset(given) | presets[name]
