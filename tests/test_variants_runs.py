"""Every method in real runs: two ranks are one process, and a stopped run goes on bit for bit."""

import dataclasses
import json

import pytest
import torch
from test_parallel import finished, start

import train
from runtime.checkpoints import load_state, saved
from runtime.flags import parse_flags
from variants.table import METHODS

STEPS = """
import dataclasses, sys
import torch
import train
from runtime import distributed
from runtime.flags import parse_flags
from tasks import opening
from tasks.opening import BaseConfig, TaskConfig
from variants.table import METHODS
# Only answers of the first rank are corrected: the other has one layer.
for name in ("nthr", "disco", "edge-gec"):
    METHODS[f"{name}, uneven"] = dataclasses.replace(
        METHODS[name],
        sources=lambda layer, seed: layer.completions.numbers.cpu() < 16,
        flags=dict(group_sizes=(4, 1) if name == "edge-gec" else (4, 2)),
    )
def main():
    saved = {}
    for name in METHODS:
        words = ["--method", name, "--preset", "smoke", "--dtype", "float32", "--device", "cpu"]
        words += ["--base-tokens", "300000", "--tokens-per-microbatch", "700", "--lr", "0.05"]
        config = parse_flags(train.Config, "", train.presets, words)
        policy, task = opening.open_model_and_task(
            puzzle=config.puzzle, base=config.base, dtype="float32", device="cpu", turns=2
        )
        config = train.settled(config, policy, task)
        sampler, _ = opening.training_sampler(config, policy, task, 2)
        reference = opening.make_reference(policy, train.method_of(config).decay < 1)
        with torch.no_grad():
            reference.embed.weight.mul_(1.05)
        policy, reference = distributed.shard(policy), distributed.shard(reference)
        optimizer, memory = torch.optim.SGD(policy.parameters(), 0.05), {}
        before = torch.cat([x.flatten() for x in distributed.full_tensors(policy)])
        # The tenth step: a reference that follows the policy moves.
        train.step(policy, reference, sampler, optimizer, task, config, 9, 0, memory)
        flat = lambda model: torch.cat([x.flatten() for x in distributed.full_tensors(model)])
        saved[name] = dict(
            moved=flat(policy) - before, weights=flat(policy), reference=flat(reference),
            memory=memory,
        )
    if distributed.rank() == 0:
        torch.save(saved, sys.argv[1])
distributed.run(main)
"""


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """A step of every method on one process and on two -> two dicts by method."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "steps.py").write_text(STEPS)
    for processes in (1, 2):
        finished(start(folder, ["steps.py", f"{processes}.pt"], processes))
    return [torch.load(folder / f"{n}.pt") for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "nthr, uneven", "disco, uneven", "edge-gec, uneven"])
def test_two_ranks_are_one_process(one_and_two, name):
    """Catches what a method counts on its own rank alone: weights, a reference that follows them,
    kinds of questions, a preference model; and ranks that wait for each other in a layer that one
    of them does not have (uneven)."""
    one, two = (saved[name] for saved in one_and_two)
    size = one["moved"].norm()
    assert size > 1e-4
    assert (one["weights"] - two["weights"]).norm() < 1e-4 * size
    assert (one["reference"] - two["reference"]).norm() < 1e-4 * size
    same(one["memory"], two["memory"])


def same(one, two):
    """Equal names, close values."""
    assert one.keys() == two.keys()
    for key, x in one.items():
        if isinstance(x, dict):
            same(x, two[key])
        else:
            torch.testing.assert_close(x, two[key], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def run(tokens, name, *words):
    words = [*words, "--tokens", str(tokens), "--preset", "smoke", "--base-tokens", "300000"]
    words += ["--device", "cpu", "--dtype", "float32", "--eval-questions", "2", "--name", name]
    config = parse_flags(train.Config, "", train.presets, [*words, "--save-every", "1"])
    return train.train(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(folder, monkeypatch, name):
    """Catches something that a method keeps from step to step and a state does not hold."""
    monkeypatch.chdir(folder)
    words = ["--method", name]
    if name == "grpo-care":
        words += ["--method-args", "follow_every=1"]
    whole, part = (run(9_000, f"{name}-{end}", *words) for end in ("whole", "part"))
    # Back to the state before the last, as if the run had been killed there.
    (_, last), (_, first), *_ = saved(part / "state")
    last.unlink()
    config = parse_flags(train.Config, "", train.presets, ["--resume", str(first)])
    resumed = train.train(dataclasses.replace(config, name=part.name))
    assert resumed == part
    states = [load_state(saved(path / "state")[0][1]) for path in (whole, resumed)]
    for key in ("weights", "optimizer", "memory", "following"):
        equal(states[0][key], states[1][key])
    logs = [map(json.loads, open(path / "metrics.jsonl")) for path in (whole, resumed)]  # noqa: SIM115
    for one, two in zip(*logs, strict=True):
        assert all(one[k] == two[k] for k in ("loss", "grad_norm", "generated", "reward1"))


def equal(one, two):
    assert one.keys() == two.keys()
    for key, x in one.items():
        if isinstance(x, dict):
            equal(x, two[key])
        else:
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(two[key])), key
