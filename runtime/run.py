"""A run's folder: what is in it, how far the run is, and how it stops and continues.

    python train.py --resume --name solve-mgrpo-0        # continues after a kill, a crash, Ctrl-C

A training script makes one `Run` around its loop. The run takes a new folder out/<name> (or, with
--resume, an old one), locks it, writes config.json, and puts a saved state back into the policy and
the optimiser. In the loop it counts steps and tokens, writes the log, and saves.

Bit-exact resuming needs little: data order and random numbers are functions of (seed, step, row,
position), so nothing depends on what was drawn before. A state holds weights, AdamW's moments,
`Progress` and the settings. `check_state` refuses one of another run.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import torch

from engine import threads
from runtime import distributed, memory, transcripts
from runtime.checkpoints import (
    NAME,
    check_moments,
    check_weights,
    load_state,
    newest_state,
    save_state,
    saved,
)
from runtime.device import Hardware
from runtime.distributed import rank0
from runtime.flags import (
    BadInput,
    check_fields,
    make_folder,
    ran_out,
    read_json,
    shown,
    writing,
)
from runtime.log import Logging, bar, plain, print_line, say, versions, write_json

MAX_SKIPPED_STEPS = 5  # optimiser steps in a row without a finite gradient; then the run ends
KEPT_STATES = 2  # the last so many, besides the best
# What --resume may change: how the run is computed and logged, how long it is, how it is evaluated.
FREE = {field.name for group in (Hardware, Logging) for field in dataclasses.fields(group)}
FREE |= {"tokens", "eval_questions", "eval_every"}


@dataclass
class Progress:
    """How far a run is: plain values, which its saved states keep."""

    step: int = 0
    generated: int = 0  # tokens
    seconds: float = 0.0
    sampling: float = 0.0  # seconds of them
    training: float = 0.0
    evaluating: float = 0.0
    updates: int = 0  # optimiser steps made
    skipped: int = 0  # in a row, because their gradients were not finite
    best: int = -1  # step of the best state: by accuracy of the last layer since the state before
    accuracy: float = -1.0  # of the best
    base: str = ""  # where the run began: the file of a base, or the folder of --init
    reference: str = ""  # checksum of the weights there, with a KL term
    recent: list = dataclasses.field(default_factory=list)  # accuracies since the last state
    results: dict = dataclasses.field(default_factory=dict)  # tables


class Run:
    """A context around a training loop.

    config: has name, resume, tokens, eval_every, kl_coef, hardware and logging. settings: the flat
    dict that config.json and states hold. policy: fp32 masters, whole or sharded, with `origin`.
    save_model(folder, weights, settings): writes the model as its users want it.
    """

    def __init__(self, config, settings, policy, reference, optimizer, save_model, plan):
        self.config, self.settings, self.plan = config, settings, plan
        self.policy, self.optimizer, self.save_model = policy, optimizer, save_model
        # What a method keeps from step to step: plain values and tensors, and the weights of a
        # reference that follows the policy.
        self.memory = {}
        self.following = reference if reference and reference.follows else None
        checksum = reference.checksum if reference else ""
        if config.resume:
            self.folder = resumed_run(config.resume, config.name)
            self.lock = alone_in(self.folder)
            state = resumed_state(config.resume, self.folder, settings, policy.config)
            # A KL term compares with the weights that the run began with: the file must still hold
            # them.
            if checksum != state["progress"]["reference"]:
                raise BadInput(
                    f"{policy.origin}: its weights are not those that {self.folder} began with, "
                    "and its reference needs those: restore the file, or start a new run"
                )
            self.restore(state)
        else:
            self.folder = run_folder(config.name, settings, policy)
            self.lock = alone_in(self.folder)
            self.progress = Progress(base=policy.origin, reference=checksum)
        self.stop, self.apart = Stop(), threads.apart(policy)

    # Where the run stands.

    @property
    def step(self):
        return self.progress.step

    @property
    def tokens(self):
        """Generated so far."""
        return self.progress.generated

    def __enter__(self):
        self.stop.__enter__()
        self.apart.__enter__()
        # A resumed run goes on counting where it was stopped.
        self.began = time.time() - self.progress.seconds
        self.bar = bar(self.config.tokens, self.config.name, "tok", initial=self.tokens)
        return self

    def finish_step(self, metrics):
        """Counts a step; afterwards `due` is about the next thing to do."""
        before, config = self.progress.generated, self.config
        self.progress.step = metrics["step"]
        self.progress.generated = metrics["generated"]
        self.progress.sampling += metrics["seconds_sampling"]
        self.progress.training += metrics["seconds_training"]
        self.bar.update(self.tokens - before)
        # Does this step complete a tenth of the run?
        self.tenth = 10 * self.tokens // config.tokens > 10 * before // config.tokens

    def stop_asked(self):
        """Whether Ctrl-C or SIGTERM has asked any rank for a stop: all ranks stop together."""
        self.stopping = bool(distributed.max_over_ranks(self.stop.asked))
        return self.stopping

    def due(self, what):
        """Whether "eval" (never after the last step: a table follows) or "save" is due."""
        over = self.tokens >= self.config.tokens
        if what == "eval":
            every = self.config.eval_every
            return not over and (self.step % every == 0 if every else self.tenth)
        every = self.config.logging.save_every
        # The first step is saved too: from then on the run can be resumed.
        due = over or self.step == 1 or (self.step % every == 0 if every else self.tenth)
        return due or self.stop_asked()

    @property
    def results(self):
        """{name: {row: result}} of the tables so far."""
        return self.progress.results

    @contextlib.contextmanager
    def evaluating(self):
        """Around an evaluation, whose time is counted."""
        began = time.perf_counter()
        yield
        self.progress.evaluating += time.perf_counter() - began

    # What the run writes.

    def log(self, metrics, problems, layers, encoding):
        """A line on the screen, a line of metrics.jsonl, the first trees into rollouts.jsonl."""
        progress, config = self.progress, self.config
        progress.seconds = time.time() - self.began
        peak = distributed.max_over_ranks(memory.peak(config.hardware.device) / memory.GB)
        metrics = metrics | dict(seconds=progress.seconds, peak_gb=peak)
        append_line(self.folder / "metrics.jsonl", metrics)
        print_line(metrics, len(config.group_sizes))
        about = dict(step=self.step, generated=self.tokens)
        if config.logging.transcripts:
            path, count = self.folder / "rollouts.jsonl", config.logging.transcripts
            transcripts.write_trees(path, layers, problems, encoding, count, about)
        self.warn(metrics, layers)

    def warn(self, metrics, layers):
        """What must not go unseen: memory, truncated answers, gradients that are not finite."""
        progress, config = self.progress, self.config
        # Skipped optimiser steps in a row: one step that was made starts the count again.
        progress.updates += metrics["updates"]
        progress.skipped = 0 if metrics["updates"] else progress.skipped + metrics["skipped"]
        # The last layer's accuracy chooses the best state, in `save`.
        accuracies = [value for name, value in metrics.items() if re.match(r"accuracy\d", name)]
        progress.recent.append(accuracies[-1])
        if self.step == 1:
            note = "" if config.hardware.device == "cuda" else ", Python and torch included"
            say(
                f"memory, GB: peak so far {metrics['peak_gb']:.2f}{note}; "
                f"{metrics['packed']:,} tokens were trained on, {metrics['padding']:.1%} of them "
                "padding"
            )
        truncated = max(value for name, value in metrics.items() if name.startswith("truncated"))
        if truncated > 0.2 and self.step % 100 == 1:
            say(
                f"{truncated:.0%} of answers are truncated at {config.max_new_tokens} tokens and "
                "score 0: raise --max-new-tokens"
            )
        # One skipped step is no reason to stop, several in a row are.
        if metrics["skipped"]:
            keep_rollout(self.folder, self.step, layers)
        if progress.skipped >= MAX_SKIPPED_STEPS:
            raise BadInput(
                f"{progress.skipped} gradients in a row were not finite. The last saved state is "
                f"intact: python train.py --resume {self.folder}. Lower --lr in a new run, or use "
                "--dtype float32"
            )
        if self.tokens >= config.tokens and not progress.updates:
            say(
                "nothing was learnt: no answer had an advantage over its siblings. An easier task, "
                "larger --group-sizes or longer answers may help"
            )

    def table(self, name, rows):
        """Keeps the results of a table, {row: result}, in result.json."""
        self.progress.results[name] = rows
        write_json(self.folder / "result.json", self.progress.results)

    def save(self):
        """The state, to resume from, and the model, to use."""
        progress = self.progress
        # The mean since the state before: the accuracy of a single step is noisy.
        accuracy = sum(progress.recent) / max(len(progress.recent), 1)
        if progress.recent and accuracy >= progress.accuracy:
            progress.best, progress.accuracy = progress.step, accuracy
        progress.recent = []
        weights, moments = distributed.full_state(self.policy, self.optimizer)  # rank 0 has them
        following = distributed.full_weights(self.following) if self.following else {}
        if distributed.rank() == 0:
            state = dict(
                settings=self.settings,
                weights=weights,
                optimizer=moments,
                best=progress.best,
                generator=torch.get_rng_state(),
                progress=dataclasses.asdict(progress),
                memory=self.memory,
                following=following,
            )
            save_state(self.folder / "state", progress.step, state, KEPT_STATES)
            self.save_model(self.policy, self.folder, weights, self.settings)

    def restore(self, state):
        """Puts a saved state back; the log is cut to its step."""
        distributed.load_full_state(
            self.policy, self.optimizer, state["weights"], state["optimizer"]
        )
        if self.following:
            distributed.load_full_weights(self.following, state["following"])
        self.memory = state["memory"]
        torch.set_rng_state(state["generator"])
        self.progress = Progress(**state["progress"])
        cut_log(self.folder, self.step)
        # The table after training belongs to an earlier end of the run.
        write_json(self.folder / "result.json", self.progress.results)
        note_resume(self.folder, {name: self.settings[name] for name in FREE}, self.step)

    # How the run ends.

    def __exit__(self, kind, error, trace):
        self.bar.close()
        self.apart.__exit__(None, None, None)
        self.stop.__exit__()
        resume = f"python train.py --resume {self.folder}"
        # Asked to stop; stopped at once; memory ran out; a file could not be written.
        if error is None and self.tokens < self.config.tokens:
            if not self.step:  # stopped during the base's table, which need not be made again
                self.save()
            say(f"stopped after step {self.step}; {resume} continues")
        elif isinstance(error, KeyboardInterrupt):
            say(f"stopped at once after step {self.step}; {resume} continues from the last state")
        elif isinstance(error, (RuntimeError, MemoryError)) and ran_out(error):
            total = memory.available(self.config.hardware.device)
            raise memory.out_of_memory(self.plan, error, total) from None
        elif (
            isinstance(error, OSError)
            and not isinstance(error, BrokenPipeError)
            and saved(self.folder / "state")
        ):
            raise OSError(f"{error}; {resume} continues from the last saved state") from None

    def minutes(self):
        """Of the whole run until now, without the base."""
        self.progress.seconds = time.time() - self.began
        return self.progress.seconds / 60

    def where_time_went(self):
        """One line: the shares of the run's time."""
        progress = self.progress
        progress.seconds = time.time() - self.began
        seconds = {
            "sampling": progress.sampling,
            "training": progress.training,
            "held-out questions": progress.evaluating,
        }
        shares = {what: x / max(progress.seconds, 1e-9) for what, x in seconds.items()}
        shares["saving and the rest"] = 1 - sum(shares.values())
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return f"time: {text}; {max(shares, key=shares.get)} bounds this run"


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second Ctrl-C stops at once.

    A second SIGTERM does not: schedulers send it to every process, and torchrun passes its own on.
    """

    asked = False

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in signals}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            name = signal.Signals(number).name
            say(f"{name}: stopping after this step; Ctrl-C once more stops at once")

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- the folder ----------------------------------------------------------------------------------


def run_folder(name, settings, policy):
    """Makes out/<name> with config.json: the settings and what made the run -> its path.

    A run that exists is never written over, nor one that another process makes at this moment.
    """
    folder = distributed.broadcast_object(lambda: new_folder(Path("out") / name))
    # seconds_base: that it took to load or make the model
    made_by = dict(base=policy.origin, seconds_base=round(policy.seconds, 1)) | versions()
    try:
        write_json(folder / "config.json", settings | dict(made_by=made_by))
    except OSError:
        folder.rmdir()  # a run without its settings is none
        raise
    other = f" (out/{name} exists, and is not written over)" if folder.name != name else ""
    say(f"run: {folder}{other}")
    return folder


def new_folder(path):
    """Makes `path`, or the first of path.2, path.3, ... that does not exist -> the Path."""
    make_folder(path.parent)
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}.{number}")
        try:
            # mkdir fails where the folder exists, so of two processes only one gets it. A look
            # before would leave a gap.
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(
                f"{folder} cannot be made ({error.strerror}): its folder must be writable"
            ) from None


@rank0
def alone_in(folder):
    """Locks the run's folder for as long as the file that is returned is open.

    BadInput if another process has the lock: the two would write over each other's states.
    """
    file = open(folder / "lock", "w")  # noqa: SIM115 - the lock is let go when the file is closed
    try:
        # The system's lock ends with the process, even with one that is killed. A file as a lock
        # would stay.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(
            f"{folder}: another process is training here; wait for it to end, or stop it"
        ) from None
    except OSError:  # some network file systems have no locks
        pass
    return file


@rank0
def append_line(path, metrics):
    line = json.dumps({name: plain(value) for name, value in metrics.items()}) + "\n"
    with writing(path, "its lines before are whole"), open(path, "a", encoding="utf-8") as file:
        file.write(line)


def keep_rollout(folder, step, layers):
    """Keeps a rollout whose gradient is not finite: tokens, log-probabilities, advantages.

    Every rank keeps its own, because the gradient is summed over ranks.
    """
    kept = [
        dict(
            prompts=layer.completions.prompts,
            tokens=layer.completions.tokens.cpu(),
            logprobs=layer.completions.logprobs.cpu(),
            lengths=layer.lengths,
            rewards=layer.rewards,
            advantages=layer.advantages,
            parents=layer.parents,
        )
        for layer in layers
    ]
    number = f"-rank{distributed.rank()}" if distributed.size() > 1 else ""
    path = make_folder(folder) / f"not-finite-{step}{number}.pt"
    # An open file, not its name: of a full disk torch would make a RuntimeError without the path.
    with writing(path), open(path, "wb") as file:
        torch.save(kept, file)
    say(
        f"step {step}: a gradient is not finite; its optimiser step is skipped, and the rollout "
        f"kept in {path}"
    )


# ---- resuming ------------------------------------------------------------------------------------


def resumed_run(resume, name=""):
    """--resume ("newest", a run's folder, or a state file) and --name -> the run's folder.

    The same on all ranks.
    """
    return distributed.broadcast_object(lambda: find_run(resume, name))


def origin_of(config):
    """Where the run that --resume continues began: the file of its base, or a folder."""
    path = resumed_run(config.resume, config.name) / "config.json"
    made_by = read_json(path, "a run has one").get("made_by")
    check_fields(made_by, dict(base=str), f"{path}: made_by")
    if not Path(made_by["base"]).exists():
        raise BadInput(
            f"{made_by['base']} is not there: {path.parent} began with its weights, and its "
            "reference needs those; restore it, or start a new run"
        )
    return made_by["base"]


def find_run(resume, name):
    """As resumed_run, on one rank. BadInput when there is no such run, or none with a state."""
    if resume == "newest":
        # Of all runs of this name (out/name, out/name.2, ...) the one that was saved last.
        paths = Path("out").glob("*/state/step-*.pt")
        states = sorted((path.stat().st_mtime, path.parents[1]) for path in paths)
        numbered = re.compile(re.escape(name) + r"(\.\d+)?")
        folders = [folder for _, folder in states if not name or numbered.fullmatch(folder.name)]
        if not folders:
            called = f" called {name}" if name else ""
            raise BadInput(
                f"--resume: no run under out/{called} has a state to go on from; name its folder"
            )
        return folders[-1]
    folder = Path(resume)
    if folder.is_file():
        if not NAME.fullmatch(folder.name) or folder.absolute().parent.name != "state":
            raise BadInput(
                f"--resume {resume} is no state: name a run's folder, or a file state/step-...pt "
                "of one"
            )
        # out/run/state/step-0000001.pt -> out/run; a path from within the run's folder has too few
        # parts.
        folder = folder.parents[1] if len(folder.parts) > 2 else folder.absolute().parents[1]
    if not saved(folder / "state"):
        raise BadInput(
            f"--resume {resume}: {folder} holds no state to go on from (state/step-...pt)"
        )
    return folder


def resumed_settings(given, kinds):
    """The settings of the run that --resume continues: a flat dict, under the flags given now.

    kinds: {name: type} of settings, as in flags.kinds. A flag that differs is printed. BadInput for
    one that would make it another run, and for a damaged config.json.
    """
    folder = resumed_run(given["resume"], given.get("name", ""))
    path = folder / "config.json"
    stored = read_json(path, "a run has one")
    check_fields(stored, {name: kinds[name] for name in kinds.keys() & stored.keys()}, path)
    for name in sorted(given.keys() - {"resume", "name"}):
        # A flag may repeat what the run was made with. Only those in FREE may change it.
        flag, was = f"--{name.replace('_', '-')}", stored.get(name)
        was = tuple(was) if isinstance(was, list) else was
        if given[name] != was and name not in FREE:
            raise BadInput(
                f"{flag} {shown(given[name])}: {folder} was made with {shown(was) or 'none'}, and "
                f"would not be continued by this; leave {flag} out, or start a new run"
            )
        if given[name] != was:
            say(f"resume: {flag} {shown(given[name])} (was {shown(was)})")
    return stored


def resumed_state(resume, folder, settings, shape):
    """The state to resume from, checked, the same on all ranks -> what save_state was given."""
    states = {}

    # Rank 0 checks the file for all; the other ranks then read it without a check.
    def check():
        if Path(resume).is_file():
            state, path = load_state(resume), resume
        else:
            state, path = newest_state(folder / "state", say)
        check_state(state, path, settings, shape)
        states["state"] = state
        return path

    path = distributed.broadcast_object(check)
    say(f"resume: from {path}")
    return states["state"] if states else load_state(path, known=True)


def check_state(state, path, settings, shape):
    """BadInput, naming the file and the fault, unless a state is whole and belongs to this run.

    settings: those of the run that continues; shape: model.ModelConfig. A checksum shows that a
    file is as it was written; this shows that the right thing was written.
    """
    kinds = dict(
        settings=dict, weights=dict, optimizer=dict, best=int, generator=torch.Tensor, progress=dict
    ) | dict(memory=dict, following=dict)
    if not isinstance(state, dict) or state.keys() != kinds.keys():
        raise BadInput(
            f"{path} does not hold {', '.join(kinds)}: it is no state of this version; resume with "
            "the code that wrote it (config.json names its commit), or start a new run"
        )
    check_fields(state, kinds, path)
    # Settings that decide the result must be those of config.json; FREE ones may differ.
    names = (state["settings"].keys() | settings.keys()) - {*FREE, "name", "resume"}
    for name in sorted(names, key=str):
        was, now = (values.get(name) for values in (state["settings"], settings))
        if type(was) is not type(now) or was != now:
            raise BadInput(
                f"{path} was made with {name} = {was!r}, and its run's config.json now says "
                f"{now!r}: put that back, or start a new run"
            )
    try:
        check_weights(state["weights"], shape)
        if state["following"]:
            check_weights(state["following"], shape)
        check_memory(state["memory"])
        check_progress(state["progress"], int(NAME.fullmatch(Path(path).name)[1]), state["best"])
        check_moments(state["optimizer"], shape, state["progress"]["updates"])
        torch.Generator().set_state(state["generator"])
    except (ValueError, TypeError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise BadInput(
            f"{path} does not fit this model and run ({str(error).splitlines()[0]}); is --init "
            "another one now?"
        ) from None


def check_progress(values, step, best):
    """ValueError unless `values` are the fields of a Progress at `step` with its best at `best`."""
    try:
        check_fields(values, get_type_hints(Progress), "progress")
    except BadInput as error:
        raise ValueError(error) from None
    p = Progress(**values)
    # Numbers that cannot be negative. best and accuracy are -1 until a state is saved.
    counts = {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and name not in ("best", "accuracy")
    }
    if (
        p.step != step
        or min(counts.values()) < 0
        or (p.generated > 0) != (step > 0)
        or not -1 <= p.best == best <= step
        or not -1 <= p.accuracy <= 1
        or p.recent
    ):
        named = counts | dict(best=p.best, accuracy=p.accuracy, recent=p.recent)
        shown = ", ".join(f"{name} = {value!r:.40}" for name, value in named.items())
        raise ValueError(f"progress holds what cannot be: {shown}")
    # The only table at this point: the one after training is made after the last save.
    base = p.results.get("base") if p.results.keys() == {"base"} else None
    if not isinstance(base, dict) or not base or not all(map(is_result, base.values())):
        raise ValueError("progress: results do not hold the table of the base")


def check_memory(values):
    """ValueError unless what a method keeps is made of names, finite numbers and tensors."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_memory(value)
        elif not isinstance(name, str) or not (
            (isinstance(value, torch.Tensor) and value.isfinite().all())
            or (type(value) in (int, float) and math.isfinite(value))
        ):
            raise ValueError(f"memory: {name!r:.40} = {value!r:.40} is no finite number or tensor")


def is_result(row):
    """Whether a row of a table has its questions and its first accuracy, as a mean and an error."""
    if not isinstance(row, dict) or type(row.get("questions")) is not int:
        return False
    pair = row.get("t1")
    return (
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(type(x) in (int, float) and math.isfinite(x) for x in pair)
    )


@rank0
def cut_log(folder, step):
    """Drops the lines of metrics.jsonl and rollouts.jsonl after `step`, and half-written ones.

    The resumed run writes them again. Line by line: rollouts.jsonl may be large.
    """
    for path in (folder / "metrics.jsonl", folder / "rollouts.jsonl"):
        if path.exists():
            temporary = Path(f"{path}.{os.getpid()}.tmp")
            try:
                # In bytes, because half a line may end within a character.
                with writing(path), open(path, "rb") as old, open(temporary, "wb") as new:
                    new.writelines(line for line in old if step_of(line) <= step)
                    new.flush()
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def step_of(line):
    """The step of a line (bytes) of a log; infinity for one that is cut short or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


@rank0
def note_resume(folder, settings, step):
    """Writes into config.json what a resumed run was given, and by which machine.

    Prints what decides how sums are rounded and is not what it was.
    """
    stored, now = read_json(folder / "config.json", "a run has one"), versions()
    made_by = stored.get("made_by", {})
    earlier = made_by.get("resumed", [])
    # What this part of the run is compared with: the part before it, which may be a resumed one.
    before = {**made_by, **earlier[-1]} if earlier else made_by
    moved = [
        f"{name} {now[name]} (was {before[name]})"
        for name in ("threads", "processes", "processor", "torch")
        if before.get(name, now[name]) != now[name]
    ]
    if moved:
        say(
            f"resume: {', '.join(moved)}: sums are rounded in another order, so this run may not "
            "be bit for bit the one that was stopped"
        )
    parts = [*earlier, dict(after_step=step) | now]
    config = stored | settings | dict(made_by=made_by | dict(resumed=parts))
    write_json(folder / "config.json", config)
