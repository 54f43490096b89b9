"""A model in a file: what is saved comes back, and no other file is taken for one."""

import pickle
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import PATIENCE, ROOT

from huggingface import weights
from runtime.checkpoints import checksum, load_checkpoint, save_checkpoint


def test_checkpoint_round_trip(tmp_path, gpt):
    """Catches a weight or a setting lost on the way to disk and back."""
    save_checkpoint(tmp_path / "a.pt", gpt, config=dict(task="solve"))
    back, extra = load_checkpoint(tmp_path / "a.pt")
    tokens = torch.randint(0, 370, (2, 9))
    assert (
        torch.equal(back(tokens), gpt(tokens))
        and extra == dict(config=dict(task="solve"))
        and list(tmp_path.iterdir()) == [tmp_path / "a.pt"]
    )


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code from a checkpoint ran",))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Hostile())])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    """Catches a traceback from unpickling, and code from the file being run."""
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")


def sealed(path, content):
    """Writes `content` as save_checkpoint would, whatever it is -> path."""
    torch.save(content, path)
    with open(path, "ab") as file:
        file.write(checksum(path).encode())
    return path


def test_no_damage_to_a_checkpoint_goes_unseen(tmp_path, gpt):
    """Catches weights with a flipped bit that load: 200 damages (a bit flipped, the end cut off, a
    block zeroed, bytes put in), each named; the whole file loads. And a file of an earlier version,
    which has no checksum, taken for a whole one or refused without a word of why."""
    path, rng = tmp_path / "a.pt", random.Random(0)
    save_checkpoint(path, gpt)
    whole = path.read_bytes()
    for i in range(200):
        place, damaged = rng.randrange(len(whole)), bytearray(whole)
        if i % 4 == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif i % 4 == 1:
            damaged = damaged[:place]
        elif i % 4 == 2:
            damaged[place : place + 4096] = bytes(len(damaged[place : place + 4096]))
        else:
            damaged[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        if damaged != whole:  # a block of zeros may have been zeroed
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="does not end with its checksum"):
                load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)
    path.write_bytes(whole[:-16])
    with pytest.raises(ValueError, match="does not end with its checksum"):
        load_checkpoint(path)


def changed(whole, place, value):
    """A copy of nested dicts with another value at a place, "a.b.c"; without it for `del`."""
    name, _, rest = place.partition(".")
    new = {key: x for key, x in whole.items() if key != name}
    return (
        new | {name: changed(whole[name], rest, value) if rest else value}
        if rest or value != "del"
        else new
    )


FORGED = [
    ("model_config", 3),
    ("weights", [1]),
    ("extra", None),
    ("weights", "del"),
    ("model_config.depth", "del"),
    ("model_config.depth", 4),
    ("model_config.depth", "3"),
    ("model_config.heads", 0),
    ("model_config.heads", 4.0),
    ("model_config.kv_heads", 3),
    ("model_config.head_size", 15),
    ("model_config.context", 10**12),
    ("model_config.vocab_size", 371),
    ("model_config.width", True),
    ("model_config.norm_eps", float("nan")),
    ("model_config.rope_theta", -1.0),
    ("model_config.tied", 1),
    ("model_config.end_tokens", (1.5,)),
    ("model_config.rope_scaling", (8.0, 4.0, 1.0, 64.0)),
    ("model_config.rope_scaling", 8),
    ("model_config.new", 1),
    ("weights.more", torch.zeros(3)),
    ("weights.7", torch.zeros(3)),
]


def test_forged_checkpoints_are_named(tmp_path, gpt):
    """Catches tracebacks and silent acceptance of what is no model, though its checksum is right:
    fields that are missing or of another type, shapes of another model, weights of integers or that
    are not finite, a head that is not the embeddings it is tied to."""
    save_checkpoint(tmp_path / "a.pt", gpt)
    whole, bad = torch.load(tmp_path / "a.pt", weights_only=True), gpt.norm.weight.detach().clone()
    for content in (3, [], {}, dict(a=1), "text", torch.zeros(3)):
        with pytest.raises(
            ValueError,
            match=r"b\.pt is not a checkpoint of this project, or is damaged \(it does not hold model_config",
        ):
            load_checkpoint(sealed(tmp_path / "b.pt", content))
    weights = [
        bad[:-1],
        bad[None],
        bad.double(),
        bad.long(),
        bad * float("nan"),
        bad / 0,
        1.0,
        None,
    ]
    for name, value in [
        *FORGED,
        *(("norm", x) for x in weights),
        ("head", whole["weights"]["embed.weight"] + 1),
    ]:
        forged = (
            dict(whole, weights=whole["weights"] | {f"{name}.weight": value})
            if name in ("norm", "head")
            else changed(whole, name, value)
        )
        with pytest.raises(
            ValueError, match=r"b\.pt is not a checkpoint of this project, or is damaged"
        ) as error:
            load_checkpoint(sealed(tmp_path / "b.pt", forged))
        assert "Error" not in str(error.value) or name == "model_config.rope_scaling", (
            name,
            error.value,
        )
    torch.save(dict(model_config=Hostile()), tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(
        (tmp_path / "b.pt").read_bytes() + checksum(tmp_path / "b.pt").encode()
    )
    with pytest.raises(ValueError, match="UnpicklingError"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """Catches half a file under a checkpoint's name: a process that saves two models in turn is
    killed with SIGKILL at random moments."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import model
from runtime import checkpoints
models = [model.GPT(model.ModelConfig(vocab_size=v)) for v in (500, 9000)]
print("ready", flush=True)
while True:
    for one in models:
        checkpoints.save_checkpoint("a.pt", one)
"""
    rng = random.Random(0)
    for _ in range(3):
        running = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE
        )
        running.stdout.read(5)
        while not (tmp_path / "a.pt").exists():
            time.sleep(0.01)
        time.sleep(0.3 * rng.random())
        running.kill()
        running.wait()
        assert load_checkpoint(tmp_path / "a.pt")[0].config.vocab_size in (500, 9000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "pretrained"])
def test_a_full_disk_keeps_what_was_there(kind, tmp_path):
    """Catches the last good checkpoint lost to one that did not fit, leftovers, and a traceback:
    files may grow to 20 kB only."""
    if kind == "pretrained":
        pytest.importorskip(
            "safetensors", reason="needs safetensors: pip install -r requirements-extra.txt"
        )
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import model
from huggingface import weights
from runtime import checkpoints, flags
small, large = (model.GPT(model.ModelConfig(vocab_size=v, width=16, depth=1, heads=1, kv_heads=1, head_size=16, hidden=16)) for v in (20, 5000))
save = checkpoints.save_checkpoint if {kind == "checkpoint"} else lambda path, gpt: weights.save_model(gpt, path)
save("m", small)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
flags.guarded(lambda: save("m", large))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (
        done.returncode == 2
        and "could not be written" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    kept = (
        weights.load_model(tmp_path / "m")
        if kind == "pretrained"
        else load_checkpoint(tmp_path / "m")[0]
    )
    assert kept.config.vocab_size == 20 and not list(tmp_path.rglob("*.tmp"))
