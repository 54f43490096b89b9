"""What survives: saved states, damaged files, kills at any moment, stops, and what may change when
a run goes on."""

import copy
import dataclasses
import functools
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, script

import train
from model import GPT, ModelConfig
from runtime import checkpoints, distributed
from runtime.checkpoints import (
    load_checkpoint,
    load_state,
    newest_state,
    save_checkpoint,
    save_state,
    saved,
)
from runtime.flags import BadInput, guarded, kinds, parse
from runtime.run import (
    Progress,
    Run,
    Stop,
    alone_in,
    check_state,
    cut_log,
    resumed_run,
    resumed_settings,
)
from tasks import base
from tasks.catalog import TaskConfig

KILLS = int(os.environ.get("KILLS", 4))
TOKENS = 30_000 * (1 + KILLS)
RUN = (
    "train.py",
    "--preset",
    "smoke",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--tokens",
    str(TOKENS),
    "--eval-questions",
    "16",
    "--save-every",
    "1",
    "--base-tokens",
    "300000",
)


def small_state(**more):
    torch.manual_seed(0)
    return dict(weights=dict(a=torch.randn(40)), progress=dict(step=3, results={}), best=-1) | more


def test_a_state_comes_back(tmp_path):
    """Catches a state that is not what was saved, or a name that does not say its step."""
    path = save_state(tmp_path / "state", 120, small_state())
    assert path.name == "step-0000120.pt" and torch.equal(
        load_state(path)["weights"]["a"], small_state()["weights"]["a"]
    )
    assert saved(tmp_path / "state") == [(120, path)]


def test_no_damage_goes_unseen(tmp_path):
    """Catches a flipped bit that loads: 200 random damages (a byte changed, the end cut off, bytes
    put in) to a state, each named, none a traceback."""
    path, rng = save_state(tmp_path, 1, small_state()), random.Random(0)
    whole = path.read_bytes()
    for i in range(200):
        place, damaged = rng.randrange(len(whole)), bytearray(whole)
        if i % 3 == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            damaged = damaged[:place]
        else:
            damaged[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="does not end with its checksum"):
            load_state(path)
    path.write_bytes(whole)
    load_state(path)


def test_the_one_before_is_used(tmp_path):
    """Catches a run lost to its newest file: a damaged one is named, and the one before it loaded;
    none at all is said."""
    paths = [save_state(tmp_path, step, small_state(mark=step)) for step in (1, 2)]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    said = []
    state, path = newest_state(tmp_path, said.append)
    assert (
        state["mark"] == 1
        and path == paths[0]
        and str(paths[1]) in said[0]
        and "the one before it is used" in said[0]
    )
    paths[0].unlink()
    with pytest.raises(BadInput, match="no state to resume from"):
        newest_state(tmp_path, said.append)


def test_the_last_and_the_best_are_kept(tmp_path):
    """Catches a disk that fills up, the best state thrown away, and temporary files of a killed
    process left for ever."""
    (tmp_path / "99.tmp").write_text("half a state")
    for step in range(1, 8):
        save_state(tmp_path, step, small_state(best=3 if step >= 3 else step), keep=2)
    assert [step for step, _ in saved(tmp_path)] == [7, 6, 3] and not list(tmp_path.glob("*.tmp"))


def test_a_state_runs_no_code(tmp_path):
    """Catches a pickle that is executed: a state that holds a call, with a checksum that fits."""
    path = save_state(tmp_path, 1, dict(bad=Hostile()))
    with pytest.raises(BadInput, match="cannot be read"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


def real_state():
    """A state as train.py saves it, of a small model after three updates -> it, its settings, the
    model's shape."""
    torch.manual_seed(0)
    shape = ModelConfig(50, 32, 1, 2, 1, 16, 32, 64)
    model, row = (
        GPT(shape),
        dict.fromkeys(("t1", "t2", "delta", "fix2", "broke2"), (0.5, 0.1)) | dict(questions=16),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randint(0, 50, (2, 5))).square().sum().backward()
        optimizer.step()
    progress = Progress(
        step=2,
        generated=100,
        updates=3,
        best=1,
        accuracy=0.5,
        results=dict(base={"greedy": row, "temperature 1": row}),
    )
    settings = dict(seed=0, lr=0.1, task="solve", tokens=100, group_sizes=(4, 3))
    return (
        dict(
            settings=dict(settings),
            weights=model.state_dict(),
            optimizer=distributed.full_state(model, optimizer)[1],
            best=1,
            generator=torch.get_rng_state(),
            progress=dataclasses.asdict(progress),
            memory=dict(q={"2/3": 0.5}, preference=dict(w1=torch.ones(3))),
            following={name: x.clone() for name, x in model.state_dict().items()},
        ),
        settings,
        shape,
    )


NAN = float("nan")
FORGED = [
    (("settings",), {}),
    (("settings", "seed"), 1),
    (("settings", "seed"), False),
    (("settings", "group_sizes"), (4, 3, 2)),
    (("settings", "group_sizes"), [4, 3]),
    (("settings", "lr"), torch.ones(2)),
    (("settings", "more"), 1),
    (("weights",), {}),
    (("weights", "norm.weight"), torch.ones(31)),
    (("weights", "norm.weight"), torch.full((32,), NAN)),
    (("weights", "norm.weight"), torch.ones(32, dtype=torch.int64)),
    (("weights", "norm.weight"), [1.0] * 32),
    (("weights", "more"), torch.ones(1)),
    (("optimizer",), {}),
    (("optimizer", "embed.weight"), {}),
    (("optimizer", "more"), {}),
    (("optimizer", "embed.weight", "exp_avg"), torch.zeros(3)),
    (("optimizer", "embed.weight", "exp_avg"), None),
    (("optimizer", "embed.weight", "exp_avg_sq"), torch.full((50, 32), -1.0)),
    (("optimizer", "embed.weight", "exp_avg"), torch.full((50, 32), NAN)),
    (("optimizer", "embed.weight", "step"), torch.tensor(2.0)),
    (("optimizer", "embed.weight", "step"), 3),
    (("best",), 2),
    (("best",), "1"),
    (("generator",), torch.get_rng_state()[:-1]),
    (("generator",), torch.zeros(5056, dtype=torch.uint8)),
    (("generator",), torch.zeros(5056)),
    (("generator",), 0),
    (("progress",), {}),
    (("progress", "step"), -2),
    (("progress", "step"), 3),
    (("progress", "step"), 2.0),
    (("progress", "generated"), -1),
    (("progress", "generated"), 0),
    (("progress", "updates"), True),
    (("progress", "updates"), 4),
    (("progress", "updates"), 0),
    (("progress", "seconds"), NAN),
    (("progress", "seconds"), "1"),
    (("progress", "evaluating"), -1.0),
    (("progress", "reference"), None),
    (("progress", "accuracy"), 1.5),
    (("progress", "recent"), [0.5]),
    (("progress", "recent"), 3),
    (("progress", "results"), {}),
    (("progress", "results"), []),
    (("progress", "results"), dict(base=3)),
    (("progress", "results", "base", "greedy"), {}),
    (("progress", "results", "base", "greedy", "t1"), 0.5),
    (("progress", "base"), 1),
    (("progress", "more"), 1),
    (("memory",), 3),
    (("memory", "q", "2/3"), NAN),
    (("memory", "q", 2), 0.5),
    (("memory", "preference", "w1"), torch.full((3,), NAN)),
    (("memory", "more"), "text"),
    (("following",), None),
    (("following", "norm.weight"), torch.ones(31)),
]


@pytest.mark.parametrize(
    "place, value",
    [((), {}), ((), []), ((), 3), ((), dict(a=1)), *FORGED],
    ids=lambda x: str(x)[:40],
)
def test_forged_states_are_refused(place, value, tmp_path):
    """Catches a state that is not what a run saves, though its checksum is right, loaded with a
    traceback, or in silence: a run would go on with other settings, other moments, no table of the
    base, or from step 0."""
    state, settings, shape = real_state()
    check_state(load_state(save_state(tmp_path, 2, state)), saved(tmp_path)[0][1], settings, shape)
    if place:
        *above, last = place
        forged = functools.reduce(operator.getitem, above, state)
        forged[last] = value
    path = (
        save_state(tmp_path / "forged", 2, state if place else value)
        if place or isinstance(value, dict)
        else None
    )
    with pytest.raises(BadInput) as error:
        check_state(
            load_state(path) if path else value,
            path or "step-0000002.pt",
            settings,
            shape,
        )
    assert (
        "step-0000002" in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 500
    )


def test_a_state_under_the_name_of_another_step(tmp_path):
    """Catches a renamed file that is taken for a later step."""
    state, settings, shape = real_state()
    path = save_state(tmp_path, 2, state)
    path = path.rename(tmp_path / path.name.replace("0000002", "0000009"))
    with pytest.raises(BadInput, match="step = 2"):
        check_state(load_state(path), path, settings, shape)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.slow
def test_a_full_disk_keeps_the_states_before(tmp_path):
    """Catches the newest good state removed for one that did not fit: files may grow to 20 kB
    only."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from runtime import checkpoints, flags
checkpoints.save_state("s", 1, dict(a=torch.zeros(10)), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
flags.guarded(lambda: checkpoints.save_state("s", 2, dict(a=torch.zeros(10_000)), keep=1))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (
        done.returncode == 2
        and "what was there before is intact" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert [step for step, _ in saved(tmp_path / "s")] == [1] and not list(
        (tmp_path / "s").glob("*.tmp")
    )
    load_state(saved(tmp_path / "s")[0][1])


@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_exactly_from_a_state(tied, tmp_path):
    """Catches weights or moments forgotten, or a step counted twice: 3 steps, written to a file,
    read into another model and optimiser, 3 more: bit-equal to 6. At step 0 there are no moments
    yet, and torch's own helper would make some."""
    torch.manual_seed(0)
    shape = ModelConfig(50, 32, 1, 2, 1, 16, 32, 64, tied=tied)
    whole = trained(GPT(shape), None, range(6))[0]
    for begin in (0, 3):
        torch.manual_seed(0)
        model, optimizer = trained(GPT(shape), None, range(begin))
        weights, moments = distributed.full_state(model, optimizer)
        assert len(moments) == (begin and len(list(model.parameters())))
        state = load_state(save_state(tmp_path, begin, dict(weights=weights, moments=moments)))
        checkpoints.check_weights(state["weights"], shape)
        checkpoints.check_moments(state["moments"], shape, begin)
        other = GPT(shape)
        optimizer = torch.optim.AdamW(other.parameters(), 0.01, fused=True)
        distributed.load_full_state(other, optimizer, state["weights"], state["moments"])
        trained(other, optimizer, range(begin, 6))
        assert all(map(torch.equal, whole.parameters(), other.parameters()))


def trained(model, optimizer, steps):
    """A model and its optimiser after these steps, each on random tokens of its own."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    for step in steps:
        tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(step))
        (model(tokens) @ model.head.weight.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of a dozen steps that nobody disturbs -> its folder's parent."""
    folder = tmp_path_factory.mktemp("runs")
    script(folder, *RUN, "--name", "whole")
    # or its weights would be those of the base all along
    assert sum(line["updates"] for line in lines(folder, "whole")) >= 10
    return folder


def weights(folder, run):
    return load_checkpoint(folder / "out" / run / "checkpoint.pt")[0].state_dict()


def lines(folder, run):
    """The log without what depends on the clock."""
    timed = (
        "seconds",
        "tokens_per_s",
        "seconds_sampling",
        "seconds_training",
        "seconds_heldout",
        "peak_gb",
    )
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed}
        for line in (folder / f"out/{run}/metrics.jsonl").read_text().splitlines()
    ]


def assert_same_run(folder, run, other):
    """Two runs have the very same weights and log."""
    ours, theirs = weights(folder, run), weights(folder, other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(folder, run) == lines(folder, other)


@pytest.mark.slow
def test_killed_at_any_moment(undisturbed):
    """Catches whatever a state forgets: a run killed with SIGKILL at random moments (writes
    included) and resumed each time ends with the very weights, log and tables of the undisturbed
    run."""
    folder, rng, kills = undisturbed, random.Random(1), 0
    for _ in range(60):
        words = (
            [*RUN, "--name", "killed"]
            if not saved(folder / "out/killed/state")
            else ["train.py", "--resume", "--name", "killed"]
        )
        running = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        step = saved(folder / "out/killed/state")[0][0] if saved(folder / "out/killed/state") else 0
        while (
            running.poll() is None
            and kills < KILLS
            and (saved(folder / "out/killed/state") or [(0, 0)])[0][0] < step + 1 + kills % 2
        ):
            time.sleep(0.002)  # until it has come a step or two further ...
        if running.poll() is None and kills < KILLS:
            time.sleep(0.25 * rng.random())  # ... and then at any moment
            running.kill()
            kills += 1
        assert running.wait() in (0, -signal.SIGKILL), running.stderr.read()
        if running.returncode == 0:
            break
    assert kills == KILLS and running.returncode == 0
    assert_same_run(folder, "killed", "whole")
    assert (folder / "out/killed/rollouts.jsonl").read_bytes() == (
        folder / "out/whole/rollouts.jsonl"
    ).read_bytes()
    tables = [
        json.loads((folder / f"out/{run}/result.json").read_text()) for run in ("killed", "whole")
    ]
    assert tables[0] == tables[1] and {
        path.name for path in (folder / "out").iterdir() if path.is_dir()
    } == {"whole", "killed"}


@pytest.mark.slow
def test_a_stop_finishes_the_step_and_says_how_to_go_on(undisturbed):
    """Catches a stop by Ctrl-C or by a scheduler's SIGTERM that loses steps, an exit code that says
    failure, and a resumed run that differs."""
    for number, name in ((signal.SIGINT, "stopped"), (signal.SIGTERM, "ended")):
        running = subprocess.Popen(
            [sys.executable, str(ROOT / RUN[0]), *RUN[1:], "--name", name, "--save-every", "1000"],
            cwd=undisturbed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while (
            running.poll() is None
            and len(
                (undisturbed / f"out/{name}/metrics.jsonl").read_text().splitlines()
                if (undisturbed / f"out/{name}/metrics.jsonl").exists()
                else ()
            )
            < 3
        ):
            time.sleep(0.01)
        running.send_signal(number)
        printed, wrong = running.communicate()
        steps = len(lines(undisturbed, name))
        assert (
            running.returncode == 0
            and f"stopped after step {steps}" in printed
            and f"--resume out/{name} continues" in printed
        ), wrong
        assert (
            saved(undisturbed / f"out/{name}/state")[0][0]
            == steps
            < len(lines(undisturbed, "whole"))
        )
    script(undisturbed, "train.py", "--resume", "out/stopped")
    assert_same_run(undisturbed, "stopped", "whole")


def test_logs_are_cut_to_the_state(tmp_path):
    """Catches a run that cannot go on since it was killed within a character, or since a power cut
    left zeros behind; and a leftover file."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + bytes(9))
    (tmp_path / "rollouts.jsonl").write_bytes(
        '{"step": 2, "q": "é"}\n{"step": 2, "q": "é'.encode()[:-1]
    )
    cut_log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n' and (
        tmp_path / "rollouts.jsonl"
    ).read_text() == '{"step": 2, "q": "é"}\n'
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_goes_on_has_no_table_of_after(undisturbed):
    """Catches the table of a finished run that stays when the run goes on and is stopped, and a
    page that does not know of more --tokens, or by whom they were asked for."""
    script(
        undisturbed,
        *RUN[:-8],
        "--tokens",
        "15000",
        "--eval-questions",
        "16",
        "--base-tokens",
        "300000",
        "--name",
        "further",
    )
    folder = undisturbed / "out/further"
    assert json.loads((folder / "result.json").read_text()).keys() == {"base", "MGRPO"}
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--resume", "out/further", "--tokens", "9000000"],
        cwd=undisturbed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = len(lines(undisturbed, "further"))
    while (
        running.poll() is None
        and len((folder / "metrics.jsonl").read_text().splitlines()) < steps + 2
    ):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    printed, wrong = running.communicate()
    assert running.returncode == 0 and re.search(rf"^ +{steps + 1} +\d\.\d\d ", printed, re.M), (
        wrong
    )
    assert json.loads((folder / "result.json").read_text()).keys() == {"base"}
    config, page = (
        json.loads((folder / "config.json").read_text()),
        (folder / "report.html").read_text(),
    )
    assert (
        config["tokens"] == 9_000_000
        and [part["after_step"] for part in config["made_by"]["resumed"]] == [steps]
        and "--resume out/further" in config["made_by"]["resumed"][0]["command"]
    )
    assert "has not finished" in page and "tokens generated of 9,000,000; it was stopped" in page


@pytest.mark.slow
def test_stopped_before_the_first_step(undisturbed, monkeypatch, capsys):
    """Catches a stop in the base's table that promises to go on and has saved nothing; and a state
    of another model loaded with a traceback."""
    monkeypatch.chdir(undisturbed)
    real = train.held_out_tables

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "held_out_tables", interrupted)
    monkeypatch.setattr(sys, "argv", [*RUN, "--name", "early"])
    train.main()
    assert "stopped after step 0" in capsys.readouterr().out and [
        step for step, _ in saved("out/early/state")
    ] == [0]
    state = load_state(saved("out/early/state")[0][1])
    with pytest.raises(BadInput, match="does not fit this model"):
        check_state(
            state,
            saved("out/early/state")[0][1],
            state["settings"],
            ModelConfig(50, 32, 1, 2, 1, 16, 32, 64),
        )


@pytest.mark.slow
def test_what_may_change_and_what_may_not(undisturbed, monkeypatch, capsys):
    """Catches a run continued with another group size or seed, a change that nobody is told of, and
    settings that are forgotten."""
    monkeypatch.chdir(undisturbed)
    settings = lambda **given: resumed_settings(given, kinds(train.Config))
    old = settings(resume="newest", name="whole", tokens_per_microbatch=64)
    assert old["tokens"] == TOKENS and old["task"] == "solve" and old["group_sizes"] == [4, 3]
    printed = capsys.readouterr().out
    assert printed == "resume: --tokens-per-microbatch 64 (was 16384)\n"
    # what a run has already is no change
    settings(resume="out/whole", group_sizes=(4, 3), clip=(0.2,), lr=1e-4)
    assert not capsys.readouterr().out
    for name, value, given, was in (
        ("group_sizes", (4, 4), "4,4", "4,3"),
        ("group_sizes", (4, 3, 2), "4,3,2", "4,3"),
        ("group_sizes", (12,), "12", "4,3"),
        ("layer_weights", (1.0, 0.5), "1,0.5", "1,1"),
        ("clip", (0.2, 0.28), "0.2,0.28", "0.2"),
        ("seed", 1, "1", "0"),
        ("task", "chain", "chain", "solve"),
        ("lr", 1.0, "1", "0.0001"),
    ):
        flag = name.replace("_", "-")
        with pytest.raises(BadInput, match=f"--{flag} {given}: out/whole was made with {was},"):
            settings(**{"resume": "out/whole", name: value})
    state = saved("out/whole/state")[0][1]
    assert str(resumed_run(str(state))) == str(resumed_run("out/whole")) == "out/whole"
    for resume, run, says in (
        ("newest", "nobody", "no run under out/ called nobody"),
        ("nowhere", "", "holds no state to go on from"),
    ):
        with pytest.raises(BadInput, match=says):
            resumed_run(resume, run)


@pytest.fixture
def resume(undisturbed, tmp_path, monkeypatch, capsys):
    """A function that runs train.py in a copy of the folder, in this process -> exit code, what it
    printed, its errors. No base can be made there."""
    shutil.copytree(undisturbed, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(base, "pretrain", lambda *_: pytest.fail("a base was made"))

    def go(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        code = 0
        try:
            guarded(train.main)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return go


def refused(outcome, *says):
    """Whether a script ended with exit code 2 and one sentence that says all this."""
    code, _, wrong = outcome
    assert (
        code == 2
        and wrong.startswith("error: ")
        and wrong.count("\n") == 1
        and all(part in wrong for part in says)
    ), wrong
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, says",
    [
        ("a list", "holds a list"),
        ("nothing", "was made with"),
        (dict(heads="left out"), "was made with heads = 2, and its run's config.json now says 4"),
        (dict(seed=1), "was made with seed = 0"),
        (dict(base_seed=1), "was made with base_seed = 0"),
        (dict(candidates=3), "was made with candidates = 2"),
        (dict(lr="1e-4"), "lr = '1e-4' is not a number"),
        (dict(lr=NAN), "lr = nan is not a number"),
        (dict(task=["solve"]), "task = ['solve'] is not one of"),
        (dict(prompts=True), "prompts = True is not a whole number"),
        (dict(tokens=1e6), "tokens = 1000000.0 is not a whole number"),
    ],
)
def test_a_config_that_is_not_that_of_its_state_is_refused(resume, change, says):
    """Catches a run that goes on with other settings than it began with, or makes another base,
    because its config.json was damaged or edited."""
    path = Path("out/whole/config.json")
    new = (
        {"a list": [], "nothing": {}}[change]
        if isinstance(change, str)
        else {k: v for k, v in (json.loads(path.read_text()) | change).items() if v != "left out"}
    )
    path.write_text(json.dumps(new))
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert refused(resume("--resume", "out/whole"), says, "config.json", "out/whole")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_what_is_no_state_cannot_be_gone_on_with(resume):
    """Catches a traceback for --resume at a file that is no state, a state of an earlier version,
    and one `{}` from which a run would start again."""
    Path("good.jsonl").write_text("{}")
    for name in ("good.jsonl", "out/whole/config.json", "out/whole/checkpoint.pt"):
        assert refused(resume("--resume", name), name, "is no state: name a run's folder")
    step, newest = saved("out/whole/state")[0]
    for content in (
        {},
        {name: value for name, value in load_state(newest).items() if name != "settings"},
    ):
        path = save_state("out/whole/state", step + 1, content)
        for name in ("out/whole", str(path)):
            assert refused(
                resume("--resume", name),
                str(path),
                "it is no state of this version; resume with the code that wrote it",
            )


@pytest.mark.slow
def test_no_base_is_needed_to_go_on_without_a_kl_term(resume):
    """Catches minutes of training a base whose weights are thrown away at once."""
    for path in Path("out").glob("base-*.pt"):
        path.unlink()
    code, printed, wrong = resume("--resume", "out/whole", "--tokens", str(TOKENS + 3000))
    assert code == 0 and "base: " not in printed and not list(Path("out").glob("base-*.pt")), wrong


@pytest.mark.slow
def test_the_start_may_be_gone(resume):
    """Catches a run that cannot go on because the run that it started from was deleted."""
    code, _, wrong = resume(*RUN[1:], "--tokens", "1", "--start", "out/whole", "--name", "later")
    assert code == 0, wrong
    shutil.rmtree("out/whole")
    code, _, wrong = resume("--resume", "out/later", "--tokens", "3000")
    assert code == 0, wrong


@pytest.mark.slow
def test_the_reference_is_the_one_that_the_run_began_with(resume, monkeypatch):
    """Catches a KL term that is measured against another base after --resume, because the code has
    changed since, or the base is gone, another or damaged: a run that goes on ends with the very
    weights of one that was not stopped, or does not go on."""
    words = [*RUN[1:], "--tokens", "16000", "--kl-coef", "0.05", "--name"]
    assert resume(*words, "through")[0] == 0
    real = Run.warn

    def stops(run, *rest):
        real(run, *rest)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "warn", stops)
        code, printed, wrong = resume(*words, "one")
    assert code == 0 and "stopped after step 2" in printed and len(lines(Path(), "through")) >= 3, (
        wrong
    )
    shutil.copytree("out/one", "out/two")
    (path,) = Path("out").glob("base-*.pt")
    whole, (model, extra) = path.read_bytes(), load_checkpoint(path)
    with monkeypatch.context() as patch:  # the code has changed: today's base is another
        patch.setattr("tasks.opening.base_path", lambda *_: Path("out/other.pt"))
        path.unlink()
        assert refused(resume("--resume", "out/one"), str(path), "restore it, or start a new run")
        path.write_bytes(whole[:-1])
        assert refused(resume("--resume", "out/one"), str(path), "does not end with its checksum")
        path.write_bytes(whole)
        assert resume("--resume", "out/one")[0] == 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight[0] += 1e-6
    save_checkpoint(path, other, **extra)
    assert refused(
        resume("--resume", "out/two"),
        str(path),
        "its weights are not those that out/two began with",
    )
    path.write_bytes(whole)
    code, _, wrong = resume("--resume", "out/two")
    assert code == 0, wrong
    for run in ("one", "two"):
        assert_same_run(Path(), run, "through")


@pytest.mark.slow
def test_a_damaged_base_is_put_aside_and_made_anew(resume, monkeypatch, capsys):
    """Catches a base with a flipped bit or a block of zeros that trains on, a traceback, and a
    damaged file that is lost or met again."""
    (path,) = Path("out").glob("base-*.pt")
    puzzle = {"candidates", "operations", "modulus", "looks"}
    smoke = base.PRESETS["smoke"] | dict(base_tokens=300_000)
    task = TaskConfig(**{name: value for name, value in smoke.items() if name in puzzle})
    config = base.BaseConfig(**{k: value for k, value in smoke.items() if k not in puzzle})
    assert path == base.base_path(task, config, "cpu", "float32")
    whole, (model, extra), said = path.read_bytes(), load_checkpoint(path), []
    monkeypatch.setattr(base, "pretrain", lambda *_: (model, extra["measured"]))
    flipped, zeroed, cut = bytearray(whole), bytearray(whole), whole[: len(whole) // 2]
    flipped[len(whole) // 2] ^= 1
    zeroed[len(whole) // 2 : len(whole) // 2 + 4096] = bytes(4096)
    other = GPT(ModelConfig(50, 32, 1, 2, 1, 16, 32, 64))
    save_checkpoint("other.pt", other, **extra)
    save_checkpoint("unmeasured.pt", model)
    for damaged in (
        flipped,
        zeroed,
        cut,
        b"",
        Path("other.pt").read_bytes(),
        Path("unmeasured.pt").read_bytes(),
    ):
        path.write_bytes(damaged)
        said.clear()
        made, measured, name = base.base_model(task, config, "cpu", "float32", said.append)
        assert name == path and measured == extra["measured"]
        assert torch.equal(made.norm.weight, model.norm.weight)
        assert str(path) in said[0] and "\n" not in said[0]
        assert f"put aside as {path}.damaged, and made anew" in said[0]
        assert Path(f"{path}.damaged").read_bytes() == damaged
        base.base_model(task, config, "cpu", "float32", said.append)
        assert said[1:] == [f"base: reusing {path}"]


def test_resume_stands_with_and_without_a_value():
    """Catches `--resume --epochs 4` read as a run called --epochs."""
    assert parse(train.Config, ["--resume", "--epochs", "4"]) == dict(resume="newest", epochs=4)
    assert (
        parse(train.Config, ["--resume", "out/x"])
        == dict(resume="out/x")
        == parse(train.Config, ["--resume=out/x"])
    )


def test_a_second_signal_stops_at_once(monkeypatch):
    """Catches a run that cannot be stopped, and handlers left behind."""
    before, said = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr("runtime.run.say", said.append)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and "once more" in said[0]
        os.kill(os.getpid(), signal.SIGTERM)  # by torchrun, after the scheduler's own
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- two at the same moment ----------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_never_make_one_folder(tmp_path, monkeypatch):
    """Catches a look whether a folder is there, and its making a moment later: eight processes of
    one name have eight folders."""
    words = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from runtime.run import new_folder; from pathlib import Path; sys.stdin.read(1); print(new_folder(Path('out/run')))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", words],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    found = {process.communicate("x")[0].strip() for process in running}
    assert found == {"out/run"} | {f"out/run.{i}" for i in range(2, 9)}


@pytest.mark.slow
def test_two_processes_never_train_in_one_folder(undisturbed):
    """Catches a run that is resumed twice at the same time: the second one is told, exits with 2,
    and changes nothing."""
    before = (undisturbed / "out/whole/metrics.jsonl").read_bytes()
    with alone_in(undisturbed / "out/whole"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--resume", "out/whole"],
            cwd=undisturbed,
            capture_output=True,
            text=True,
        )
    assert (
        done.returncode == 2
        and "another process is training here" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (undisturbed / "out/whole/metrics.jsonl").read_bytes() == before
    script(undisturbed, "train.py", "--resume", "out/whole")
