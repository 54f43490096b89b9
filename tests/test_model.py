"""The GPT and the way from vectors to probabilities, against plain formulas."""

import copy
import math
import pickle
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import PATIENCE, ROOT

from huggingface import weights
from model import (
    GPT,
    ModelConfig,
    checksum,
    compute_dtype,
    load_checkpoint,
    rope_tables,
    rotate,
    save_checkpoint,
    token_logprobs,
)


def test_attention_is_causal_and_ignores_right_pads(gpt):
    """Catches a mask that looks ahead, and pads that reach real tokens: changing what comes after
    must change nothing before."""
    a = torch.randint(0, 370, (2, 12))
    b = a.clone()
    b[:, 7:] = 0
    torch.testing.assert_close(gpt(a)[:, :7], gpt(b)[:, :7], atol=1e-4, rtol=0)
    torch.testing.assert_close(gpt(a[:, :7]), gpt(a)[:, :7], atol=1e-4, rtol=0)


def test_attention_equals_torchs(gpt):
    """Catches a wrong scale, head order or softmax in the CPU attention: torch's own fused
    attention is the oracle."""
    from model import causal_attention

    torch.manual_seed(0)
    for N, K in ((4, 1), (4, 2), (3, 3)):
        q, k, v = torch.randn(2, 9, N, 16), torch.randn(2, 9, K, 16), torch.randn(2, 9, K, 16)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(causal_attention(0, q, k, v), expected.transpose(1, 2))


def test_rope_depends_on_distance_alone():
    """Catches a sign or a pairing error in RoPE: q at p+3 against k at p has the same product for
    every p, another for another distance."""
    cos, sin = rope_tables(64, 16, 10_000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def at(x, p):
        return rotate(x, cos[p][None, None, None], sin[p][None, None, None])

    products = [(at(q, p + 3) * at(k, p)).sum().item() for p in (0, 5, 40)]
    assert max(products) - min(products) < 1e-4
    assert abs((at(q, 9) * at(k, 5)).sum().item() - products[0]) > 1e-3
    torch.testing.assert_close(at(q, 11).norm(), q.norm())


def test_rope_turns_by_the_angles_of_the_paper():
    """Catches interleaved pairs for halves: position p turns (x_i, x_i+C/2) by p · theta^(-2i/C),
    as complex multiplication says."""
    cos, sin = rope_tables(8, 6, 100.0)
    x = torch.randn(6)
    turned = torch.complex(x[:3], x[3:]) * torch.polar(
        torch.ones(3), 5 * 100.0 ** (-2 * torch.arange(3) / 6)
    )
    torch.testing.assert_close(
        rotate(x[None, None, None], cos[5], sin[5]).flatten(), torch.cat([turned.real, turned.imag])
    )


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_the_naive_version(chunk, temperature):
    """Catches a wrong recomputation in backward, or a chunk border: values and both gradients equal
    log_softmax + gather in float64."""
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(23, 8, dtype=torch.float64),
        torch.randn(11, 8, dtype=torch.float64),
    )
    tokens, weights = torch.randint(0, 11, (23,)), torch.randn(23)
    results = []
    for naive in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if naive:
            z = (h @ w.T / temperature).log_softmax(-1)
            logp, entropy = z.gather(1, tokens[:, None])[:, 0], -(z.exp() * z).sum(-1)
        else:
            logp, entropy = token_logprobs(h, w, tokens, temperature, chunk)
        (logp * weights).sum().backward()
        results.append((logp.float(), entropy.float(), h.grad.float(), w.grad.float()))
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_entropy_carries_no_gradient():
    """Catches the diagnostic entering the loss."""
    hidden = torch.randn(3, 4, requires_grad=True)
    assert not token_logprobs(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]))[1].requires_grad


def test_initial_loss_is_that_of_a_uniform_guess():
    """Catches an init that starts far from uniform: the first loss of a fresh model must be log V,
    within 2 %."""
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(vocab_size=370))
    tokens = torch.randint(0, 370, (8, 33))
    logp, _ = token_logprobs(
        gpt(tokens)[:, :-1].reshape(-1, 128), gpt.head.weight, tokens[:, 1:].reshape(-1)
    )
    assert abs(-logp.mean().item() / math.log(370) - 1) < 0.02


def test_masters_stay_fp32_under_bf16_compute():
    """Catches parameters stored in bf16, which would round away updates of an Adam step at small
    lr."""
    gpt = GPT(ModelConfig(vocab_size=50), torch.bfloat16)
    hidden = gpt(torch.randint(0, 50, (2, 5)))
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16 and all(
        p.dtype == p.grad.dtype == torch.float32 for p in gpt.parameters()
    )


def test_too_long_a_row_is_refused(gpt):
    """Catches positions beyond the RoPE table."""
    with pytest.raises(ValueError, match="257 tokens does not fit the model's context of 256"):
        gpt(torch.zeros(1, 257, dtype=torch.long))


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
    with pytest.raises(
        ValueError, match="files of earlier versions have none, and need those versions' code"
    ):
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


def test_killed_while_saving(tmp_path):
    """Catches half a file under a checkpoint's name: a process that saves two models in turn is
    killed with SIGKILL at random moments."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import model
models = [model.GPT(model.ModelConfig(vocab_size=v)) for v in (500, 9000)]
print("ready", flush=True)
while True:
    for one in models:
        model.save_checkpoint("a.pt", one)
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


def test_compute_dtype():
    """Catches auto falling back to an error, or a named type being overruled."""
    assert (
        compute_dtype("float32", "cuda") == torch.float32
        and compute_dtype("auto", "cuda") == torch.bfloat16
    )
    assert compute_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


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
from runtime import flags
small, large = (model.GPT(model.ModelConfig(vocab_size=v, width=16, depth=1, heads=1, kv_heads=1, head_size=16, hidden=16)) for v in (20, 5000))
save = model.save_checkpoint if {kind == "checkpoint"} else lambda path, gpt: weights.save_model(gpt, path)
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


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
def test_compiled_blocks_are_the_same(gpt):
    """Catches --compile that changes what is computed, or that compiles anew for every length: loss
    and gradient of three lengths to 1e-5."""
    compiled = copy.deepcopy(gpt)
    compiled.compile_blocks()
    for length in (5, 9, 14):
        tokens, losses = (
            torch.randint(0, 200, (2, length), generator=torch.Generator().manual_seed(length)),
            [],
        )
        for model in (gpt, compiled):
            model.zero_grad()
            losses.append(model(tokens).square().mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(gpt.parameters(), compiled.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_compile_without_a_compiler_is_said(monkeypatch):
    """Catches a traceback of torch's after the base has been made."""
    import train
    from tasks import opening

    monkeypatch.setattr(opening.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(opening.BadInput, match="needs a C\\+\\+ compiler"):
        opening.validate(train.Config(compile=True))
