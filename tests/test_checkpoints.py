"""What survives: saved states, damaged files, kills at any moment, stops, and what may change when a run goes on."""
import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, script

import checkpoints
import heldout
import journal
import train
from checkpoints import Stop, alone_in, fitting, load_state, newest_state, resumed_run, resumed_settings, save_state, saved
from flags import BadInput, parse
from memory import HostAdamW
from model import GPT, ModelConfig, load_checkpoint

KILLS = int(os.environ.get("KILLS", 4))
TOKENS = 30_000 * (1 + KILLS)
RUN = ("train.py", "--preset", "smoke", "--dtype", "float32", "--device", "cpu", "--tokens", str(TOKENS), "--eval-questions", "16", "--save-every", "1", "--base-tokens", "300000")


def small_state(**more):
    torch.manual_seed(0)
    return dict(weights=dict(a=torch.randn(40)), progress=dict(step=3, results={}), best=-1) | more


def test_a_state_comes_back(tmp_path):
    """Catches a state that is not what was saved, or a name that does not say its step."""
    path = save_state(tmp_path / "state", 120, small_state())
    assert path.name.startswith("step-0000120-") and torch.equal(load_state(path)["weights"]["a"], small_state()["weights"]["a"])
    assert saved(tmp_path / "state") == [(120, path)]


def test_no_damage_goes_unseen(tmp_path):
    """Catches a flipped bit that loads: 200 random damages (a byte changed, the end cut off, bytes put in) to a state, each named, none a
    traceback."""
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
        with pytest.raises(BadInput, match="does not have the checksum"):
            load_state(path)
    path.write_bytes(whole)
    load_state(path)


def test_the_one_before_is_used(tmp_path):
    """Catches a run lost to its newest file: a damaged one is named, and the one before it loaded; none at all is said."""
    paths = [save_state(tmp_path, step, small_state(mark=step)) for step in (1, 2)]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    said = []
    state, path = newest_state(tmp_path, said.append)
    assert state["mark"] == 1 and path == paths[0] and str(paths[1]) in said[0] and "the one before it is used" in said[0]
    paths[0].unlink()
    with pytest.raises(BadInput, match="no state to resume from"):
        newest_state(tmp_path, said.append)


def test_the_last_and_the_best_are_kept(tmp_path):
    """Catches a disk that fills up, the best state thrown away, and temporary files of a killed process left for ever."""
    (tmp_path / "99.tmp").write_text("half a state")
    for step in range(1, 8):
        save_state(tmp_path, step, small_state(best=3 if step >= 3 else step), keep=2)
    assert [step for step, _ in saved(tmp_path)] == [7, 6, 3] and not list(tmp_path.glob("*.tmp"))


def test_a_state_runs_no_code(tmp_path):
    """Catches a pickle that is executed: a state that holds a call, with a checksum that fits."""
    path = tmp_path / "1.tmp"
    torch.save(dict(bad=Hostile()), path)
    path = path.rename(tmp_path / f"step-0000001-{checkpoints.checksum(path)}.pt")
    with pytest.raises(BadInput, match="cannot be read"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_full_disk_keeps_the_states_before(tmp_path):
    """Catches the newest good state removed for one that did not fit: files may grow to 20 kB only."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, checkpoints, flags
checkpoints.save_state("s", 1, dict(a=torch.zeros(10)), keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
flags.guarded(lambda: checkpoints.save_state("s", 2, dict(a=torch.zeros(10_000)), keep=1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "the steps before it are intact" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [step for step, _ in saved(tmp_path / "s")] == [1] and not list((tmp_path / "s").glob("*.tmp"))
    load_state(saved(tmp_path / "s")[0][1])


@pytest.mark.parametrize("kind", [HostAdamW, torch.optim.AdamW])
def test_an_optimiser_goes_on(kind):
    """Catches moments or masters forgotten: 3 steps, saved and loaded into another model and optimiser, 3 more: bit-equal to 6."""
    torch.manual_seed(0)
    shape = ModelConfig(50, 32, 1, 2, 1, 16, 32, 64)
    one = GPT(shape)
    first, other = kind(one.parameters(), 0.01), None
    for step in range(6):
        tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(step))
        if step == 3:
            two = GPT(shape)
            other = kind(two.parameters(), 0.01)
            two.load_state_dict(one.state_dict())
            other.load_state_dict(copy.deepcopy(first.state_dict()))        # torch takes tensors over as they are
        for model, optimizer in ((one, first), (two, other)) if other else ((one, first),):
            model(tokens).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


# -------------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of a dozen steps that nobody disturbs -> its folder's parent."""
    folder = tmp_path_factory.mktemp("runs")
    script(folder, *RUN, "--name", "whole")
    assert sum(line["updates"] for line in lines(folder, "whole")) >= 10         # or its weights would be those of the base all along
    return folder


def weights(folder, run):
    return load_checkpoint(folder / "out" / run / "checkpoint.pt")[0].state_dict()


def lines(folder, run):
    """The log without what depends on the clock."""
    timed = ("seconds", "tokens_per_s", "seconds_sampling", "seconds_training", "seconds_transcripts", "seconds_heldout", "peak_gb")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (folder / f"out/{run}/metrics.jsonl").read_text().splitlines()]


def test_killed_at_any_moment(undisturbed):
    """Catches whatever a state forgets: a run killed with SIGKILL at random moments (writes included) and resumed each time ends with the very
    weights, log and tables of the undisturbed run."""
    folder, rng, kills = undisturbed, random.Random(1), 0
    for _ in range(60):
        words = [*RUN, "--name", "killed"] if not saved(folder / "out/killed/state") else ["train.py", "--resume", "--name", "killed"]
        running = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        step = saved(folder / "out/killed/state")[0][0] if saved(folder / "out/killed/state") else 0
        while running.poll() is None and kills < KILLS and (saved(folder / "out/killed/state") or [(0, 0)])[0][0] < step + 1 + kills % 2:
            time.sleep(0.002)                                # until it has come a step or two further ...
        if running.poll() is None and kills < KILLS:
            time.sleep(0.25 * rng.random())                  # ... and then at any moment
            running.kill()
            kills += 1
        assert running.wait() in (0, -signal.SIGKILL), running.stderr.read()
        if running.returncode == 0:
            break
    assert kills == KILLS and running.returncode == 0
    ours, theirs = weights(folder, "killed"), weights(folder, "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(folder, "killed") == lines(folder, "whole")
    assert (folder / "out/killed/rollouts.jsonl").read_bytes() == (folder / "out/whole/rollouts.jsonl").read_bytes()
    tables = [json.loads((folder / f"out/{run}/result.json").read_text()) for run in ("killed", "whole")]
    assert tables[0] == tables[1] and {path.name for path in (folder / "out").iterdir() if path.is_dir()} == {"whole", "killed"}


def test_a_stop_finishes_the_step_and_says_how_to_go_on(undisturbed):
    """Catches a stop by Ctrl-C or by a scheduler's SIGTERM that loses steps, an exit code that says failure, and a resumed run that differs."""
    for number, name in ((signal.SIGINT, "stopped"), (signal.SIGTERM, "ended")):
        running = subprocess.Popen([sys.executable, str(ROOT / RUN[0]), *RUN[1:], "--name", name, "--save-every", "1000"], cwd=undisturbed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while running.poll() is None and len((undisturbed / f"out/{name}/metrics.jsonl").read_text().splitlines() if (undisturbed / f"out/{name}/metrics.jsonl").exists() else ()) < 3:
            time.sleep(0.01)
        running.send_signal(number)
        printed, wrong = running.communicate()
        steps = len(lines(undisturbed, name))
        assert running.returncode == 0 and f"stopped after step {steps}" in printed and f"--resume out/{name} goes on" in printed, wrong
        assert saved(undisturbed / f"out/{name}/state")[0][0] == steps < len(lines(undisturbed, "whole"))
    script(undisturbed, "train.py", "--resume", "out/stopped")
    ours, theirs = weights(undisturbed, "stopped"), weights(undisturbed, "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and lines(undisturbed, "stopped") == lines(undisturbed, "whole")


def test_logs_are_cut_to_the_state(tmp_path):
    """Catches a run that cannot go on since it was killed within a character, or since a power cut left zeros behind; and a leftover file."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + bytes(9))
    (tmp_path / "rollouts.jsonl").write_bytes('{"step": 2, "q": "é"}\n{"step": 2, "q": "é'.encode()[:-1])
    journal.cut_log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n' and (tmp_path / "rollouts.jsonl").read_text() == '{"step": 2, "q": "é"}\n'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_goes_on_has_no_table_of_after(undisturbed):
    """Catches the table of a finished run that stays when the run goes on and is stopped, and a page that does not know of more --tokens, or by whom they were
    asked for; and switches of the first process that a second one cannot turn off."""
    script(undisturbed, *RUN[:-8], "--tokens", "15000", "--eval-questions", "16", "--base-tokens", "300000", "--name", "further", "--quiet")
    folder = undisturbed / "out/further"
    assert json.loads((folder / "result.json").read_text()).keys() == {"base", "MGRPO"}
    running = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--resume", "out/further", "--tokens", "9000000"], cwd=undisturbed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    steps = len(lines(undisturbed, "further"))
    while running.poll() is None and len((folder / "metrics.jsonl").read_text().splitlines()) < steps + 2:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    printed, wrong = running.communicate()
    assert running.returncode == 0 and re.search(rf"^ +{steps + 1} +\d\.\d\d ", printed, re.M), wrong            # it says its steps: --quiet was the other process's
    assert json.loads((folder / "result.json").read_text()).keys() == {"base"}
    config, page = json.loads((folder / "config.json").read_text()), (folder / "report.html").read_text()
    assert config["tokens"] == 9_000_000 and [part["after_step"] for part in config["made_by"]["resumed"]] == [steps] and "--resume out/further" in config["made_by"]["resumed"][0]["command"]
    assert "has not finished" in page and "tokens generated of 9,000,000; it was stopped" in page


def test_stopped_before_the_first_step(undisturbed, monkeypatch, capsys):
    """Catches a stop in the base's table that promises to go on and has saved nothing; and a state of another model loaded with a traceback."""
    monkeypatch.chdir(undisturbed)
    real = heldout.table_of

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(heldout, "table_of", interrupted)
    monkeypatch.setattr(sys, "argv", [*RUN, "--name", "early"])
    train.main()
    assert "stopped after step 0" in capsys.readouterr().out and [step for step, _ in saved("out/early/state")] == [0]
    state = load_state(saved("out/early/state")[0][1])
    with pytest.raises(BadInput, match="does not fit this model"), fitting(undisturbed / "out/early"):
        GPT(ModelConfig(50, 32, 1, 2, 1, 16, 32, 64)).load_state_dict(state["weights"])


def test_what_may_change_and_what_may_not(undisturbed, monkeypatch):
    """Catches a run continued with another group size or seed, a change that nobody is told of, and settings that are forgotten."""
    monkeypatch.chdir(undisturbed)
    names, said = list(train.Config.__dataclass_fields__), []
    old = resumed_settings(dict(resume="newest", name="whole", tokens_per_microbatch=64), names, said.append)
    assert old["tokens"] == TOKENS and old["task"] == "solve" and said == ["resume: --tokens-per-microbatch 64 (was 16384)"]
    for name, value in (("attempts", 9), ("seed", 1), ("task", "chain"), ("lr", 1.0)):
        with pytest.raises(BadInput, match=f"--{name} {value}: out/whole was made with"):
            resumed_settings(dict(resume="out/whole", **{name: value}), names, said.append)
    state = saved("out/whole/state")[0][1]
    assert str(resumed_run(str(state))) == str(resumed_run("out/whole")) == "out/whole"
    for resume, run, says in (("newest", "nobody", "no run under out/ called nobody"), ("nowhere", "", "holds no state to go on from")):
        with pytest.raises(BadInput, match=says):
            resumed_run(resume, run)


def test_resume_stands_with_and_without_a_value():
    """Catches `--resume --epochs 4` read as a run called --epochs."""
    assert parse(train.Config, ["--resume", "--epochs", "4"]) == dict(resume="newest", epochs=4)
    assert parse(train.Config, ["--resume", "out/x"]) == dict(resume="out/x") == parse(train.Config, ["--resume=out/x"])


def test_a_second_signal_stops_at_once():
    """Catches a run that cannot be stopped, and handlers left behind."""
    before, said = signal.getsignal(signal.SIGTERM), []
    with Stop(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and "once more" in said[0]
        os.kill(os.getpid(), signal.SIGTERM)                 # by torchrun, after the scheduler's own
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------------- two at the same moment

def test_two_processes_never_make_one_folder(tmp_path, monkeypatch):
    """Catches a look whether a folder is there, and its making a moment later: eight processes of one name have eight folders."""
    words = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from journal import new_folder; from pathlib import Path; sys.stdin.read(1); print(new_folder(Path('out/run')))"
    running = [subprocess.Popen([sys.executable, "-c", words], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    found = {process.communicate("x")[0].strip() for process in running}
    assert found == {"out/run"} | {f"out/run.{i}" for i in range(2, 9)}


def test_two_processes_never_train_in_one_folder(undisturbed):
    """Catches a run that is resumed twice at the same time: the second one is told, exits with 2, and changes nothing."""
    before = (undisturbed / "out/whole/metrics.jsonl").read_bytes()
    with alone_in(undisturbed / "out/whole"):
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--resume", "out/whole"], cwd=undisturbed, capture_output=True, text=True)
    assert done.returncode == 2 and "another process is training here" in done.stderr and "Traceback" not in done.stderr
    assert (undisturbed / "out/whole/metrics.jsonl").read_bytes() == before
    script(undisturbed, "train.py", "--resume", "out/whole")
