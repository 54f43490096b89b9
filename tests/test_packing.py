"""The packed tree against rows one by one: who sees whom, log-probabilities, gradients, and how
trees are cut into micro-batches."""

import random
from types import SimpleNamespace as Namespace

import pytest
import torch
from conftest import VOCABULARY
from torch.nn.attention.flex_attention import flex_attention

from engine import packing
from engine.packing import (
    BLOCK,
    block_mask,
    by_flex,
    by_levels,
    compiled_flex,
    leaf,
    logprobs,
    pack,
    row_packs,
    tree_packs,
)
from model import GPT, ModelConfig


def random_layers(rng, depth, questions=3, most=9):
    """Layers of a rollout nobody sampled: ragged, some attempts without a continuation, some rows
    of one token, some cut rows."""
    words = lambda count: [rng.randrange(VOCABULARY) for _ in range(count)]
    layers, prompts, parents = [], [words(rng.randint(1, most)) for _ in range(questions)], None
    for level in range(depth):
        n = rng.randint(1, 3)
        sampled = [words(rng.randint(1, most)) for _ in range(n * len(prompts))]
        of = (
            torch.arange(len(prompts)).repeat_interleave(n)
            if parents is None
            else parents.repeat_interleave(n)
        )
        layers.append(
            Namespace(
                completions=Namespace(prompts=prompts, n=n, sampled=sampled, depth=level + 1),
                parents=of,
            )
        )
        going = sorted(rng.sample(range(len(sampled)), rng.randint(1, len(sampled))))
        ended = [rng.random() < 0.5 for _ in going]
        prompts = [
            prompts[i // n] + (sampled[i][:-1] if end else sampled[i]) + words(rng.randint(1, 4))
            for i, end in zip(going, ended)
        ]
        parents = torch.tensor(going)
    return layers


def leaves_of(layers, rng=None, share=1.0):
    """All rows, or a share of them, as leaves."""
    return [
        leaf(layers, depth, row)
        for depth, layer in enumerate(layers, 1)
        for row in range(len(layer.completions.sampled))
        if rng is None or rng.random() < share
    ]


def row_tokens(one):
    c = one.layer.completions
    return c.prompts[one.row // c.n], c.sampled[one.row]


def length(one):
    return sum(map(len, row_tokens(one)))


@pytest.fixture(params=["plain", "gqa, norms, biases"])
def model(request):
    torch.manual_seed(0)
    switches = dict(
        plain=dict(kv_heads=2),
        **{"gqa, norms, biases": dict(kv_heads=1, qk_norm=True, qkv_bias=True, tied=False)},
    )[request.param]
    gpt = GPT(
        ModelConfig(
            VOCABULARY, width=32, depth=2, heads=2, head_size=16, hidden=48, context=64, **switches
        )
    )
    with torch.no_grad():
        gpt.embed.weight.mul_(12)
    return gpt


def one_by_one(model, leaves, weights):
    """Log-probabilities of each row from a forward pass of its own, and the gradient of their
    weighted sum."""
    model.zero_grad()
    found = []
    for one, weight in zip(leaves, weights):
        prompt, sampled = row_tokens(one)
        ids = torch.tensor([prompt + sampled])
        logp = (
            (model(ids)[0] @ model.head.weight.T)
            .log_softmax(-1)[len(prompt) - 1 : -1]
            .gather(1, torch.tensor(sampled)[:, None])[:, 0]
        )
        (weight * logp.sum()).backward()
        found.append(logp.detach())
    return found, gradient(model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_packed_tree_is_its_rows(model, depth, seed):
    """Catches a token that sees a sibling, or not its past; a wrong position; a row's first token
    predicted from the wrong place; a trunk whose gradient lacks a branch: log-probabilities to
    1e-5, gradients to 1e-5 of their size."""
    rng = random.Random(f"{depth}/{seed}")
    leaves = tree_packs(leaves_of(random_layers(rng, depth), rng, 0.7), 10**9)[0]
    weights = [rng.uniform(-1, 1) for _ in leaves]
    expected, slope = one_by_one(model, leaves, weights)
    model.zero_grad()
    logp, entropy = logprobs(model, pack(leaves))
    (logp.sum(1) * torch.tensor(weights)).sum().backward()
    for row, wanted in zip(logp, expected):
        torch.testing.assert_close(row[: len(wanted)].detach(), wanted, atol=1e-5, rtol=1e-5)
        assert (row[len(wanted) :] == 0).all()
    assert (gradient(model) - slope).norm() < 1e-5 * slope.norm() and entropy.shape == logp.shape


def test_bfloat16_is_as_near_as_rows(model):
    """Catches sums of a trunk's gradients that lose more than rounding: against fp32, a tree in
    bf16 errs no more than twice as much as its rows in bf16."""
    leaves = tree_packs(leaves_of(random_layers(random.Random(1), 2, questions=4)), 10**9)[0]
    _, exact = one_by_one(model, leaves, [1.0] * len(leaves))
    model.compute, errors = torch.bfloat16, []
    for kind in ("tree", "rows"):
        model.zero_grad()
        logprobs(model, packing.batch_of(leaves, kind, "cpu"))[0].sum().backward()
        errors.append((gradient(model) - exact).norm() / exact.norm())
    assert errors[0] < 2 * errors[1] and errors[1] < 0.1


@pytest.mark.cuda
def test_a_pass_waits_for_nobody():
    """Catches a copy or a number asked for in the middle of a micro-batch, for which the host would
    wait: torch is told to raise on any."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from tools import bench, bench_training

    one = bench_training.Bench(
        bench.Config(rows=8, group=4, corrections=2, new=9), torch.bfloat16, "cuda"
    )
    layers = one.rollout(bench_training.Clock("cuda"))
    leaves = tree_packs(
        [
            leaf(layers, depth, row)
            for depth, layer in enumerate(layers, 1)
            for row in range(len(layer.advantages))
        ],
        10**9,
    )[0]
    import train

    for mode in ("default", "error"):  # the first compiles, and copies what is made once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train.loss_of(one.model, None, leaves, {1: 8, 2: 16}, one.settings)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_every_token_once():
    """Catches a trunk that is carried twice, which would be slower and go unseen."""
    layers = random_layers(random.Random(0), 3)
    forest = pack(tree_packs(leaves_of(layers), 10**9)[0])
    segments = {}
    for one in leaves_of(layers):
        for key, tokens in one.path:
            segments[key] = max(len(tokens), segments.get(key, 0))
    assert forest.needed == sum(segments.values()) < sum(map(length, leaves_of(layers))) / 2
    assert forest.needed <= len(forest.tokens) <= 1.125 * forest.needed


@pytest.mark.parametrize("seed", range(4))
def test_two_comparisons_find_ancestors(seed):
    """Catches an interval one too long or short: `k <= i < until[k]` against a search up the tree,
    padding included."""
    leaves = tree_packs(leaves_of(random_layers(random.Random(seed), 3)), 10**9)[0]
    forest, segments = pack(leaves), packing.plant(leaves).values()
    S = len(forest.tokens)
    wanted = torch.eye(S, dtype=torch.bool)
    for segment in segments:
        here = range(segment.start, segment.start + len(segment.tokens))
        for t in here:
            wanted[t, [*packing.above_of(segment), *range(segment.start, t + 1)]] = True
    i = torch.arange(S)
    assert torch.equal((i[None] <= i[:, None]) & (i[:, None] < forest.until[None]), wanted)
    assert all(
        forest.positions[segment.start + i] == len(packing.above_of(segment)) + i
        for segment in segments
        for i in range(len(segment.tokens))
    )


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_the_mask(seed):
    """Catches a block that is left out though something in it is seen, or taken for full though
    something is not."""
    forest = pack(
        tree_packs(leaves_of(random_layers(random.Random(seed), 3, questions=2, most=300)), 10**9)[
            0
        ],
        multiple=BLOCK,
    )
    i = torch.arange(len(forest.tokens))
    seen = (
        ((i[None] <= i[:, None]) & (i[:, None] < forest.until[None]))
        .view(len(i) // BLOCK, BLOCK, -1, BLOCK)
        .float()
        .mean((1, 3))
    )
    mask, found = block_mask(forest), torch.zeros_like(seen)
    for counts, indices, value in (
        (mask.kv_num_blocks, mask.kv_indices, 0.5),
        (mask.full_kv_num_blocks, mask.full_kv_indices, 1.0),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            found[row, indices[0, 0, row, :count].long()] = value
    assert torch.equal(found, torch.where(seen == 0, 0.0, torch.where(seen == 1, 1.0, 0.5))) and {
        0.0,
        0.5,
        1.0,
    } == set(found.flatten().tolist())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_sees_the_same(seed, device):
    """Catches heads, types or scales that FlexAttention takes otherwise than attention level by
    level, on packs of several blocks; on CUDA its gradients too (it has none on a CPU, where
    nothing but this test calls it)."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    forest = pack(
        tree_packs(leaves_of(random_layers(random.Random(seed), 3, questions=6, most=40)), 10**9)[
            0
        ],
        multiple=BLOCK,
    )
    generator, S = torch.Generator().manual_seed(seed), len(forest.tokens)
    assert S % BLOCK == 0 and S > 3 * BLOCK
    q, k, v = (torch.randn(1, S, heads, 16, generator=generator) for heads in (4, 2, 2))
    results = []
    there = Namespace(until=forest.until.to(device))
    for attend, place in (
        (by_levels(forest), "cpu"),
        (by_flex(there, compiled_flex() if device == "cuda" else flex_attention), device),
    ):
        inputs = [x.to(place).clone().requires_grad_(device == "cuda") for x in (q, k, v)]
        out = attend(0, *inputs)[:, : forest.needed]
        if device == "cuda":
            out.square().sum().backward()
        results.append(
            [
                out.detach().cpu(),
                *(x.grad[:, : forest.needed].cpu() for x in inputs if device == "cuda"),
            ]
        )
    for ours, theirs in zip(*results):
        torch.testing.assert_close(
            ours,
            theirs,
            atol=1e-5 if device == "cpu" else 1e-2,
            rtol=1e-4 if device == "cpu" else 1e-2,
        )


@pytest.mark.parametrize("cut", [tree_packs, row_packs])
def test_micro_batches_hold_every_row_once_and_keep_the_limit(cut):
    """Catches rows lost where a pack ends, and packs beyond the limit that could have been two."""
    layers = random_layers(random.Random(3), 3, questions=9)
    leaves = leaves_of(layers)
    names = lambda some: [one.path[-1][0] for one in some]
    for most in (1, 60, 200, 10**9):
        found = cut(leaves, most)
        assert sorted(name for some in found for name in names(some)) == sorted(names(leaves))
        for some in found:
            size = (
                pack(some).needed if cut is tree_packs else len(some) * (max(map(length, some)) - 1)
            )
            assert size <= most or len(some) == 1
        assert most > 1 or len(found) == len(leaves)
    assert len(cut(leaves, 10**9)) == 1


def test_a_tree_cut_in_two_has_the_same_gradient(model):
    """Catches a trunk that is missing in the second half of a tree too large for one pack."""
    rng = random.Random(5)
    leaves = leaves_of(random_layers(rng, 2, questions=2))
    results = []
    for most in (10**9, 40, 1):
        model.zero_grad()
        packs = tree_packs(leaves, most)
        for some in packs:
            logprobs(model, pack(some))[0].sum().backward()
        results.append((len(packs), gradient(model)))
    assert results[0][0] == 1 < results[1][0] < results[2][0] == len(leaves)
    assert all((other - results[0][1]).norm() < 1e-5 * other.norm() for _, other in results[1:])


def test_the_file_draws_its_opening(capsys):
    """Catches a picture in the docstring that is not what the code does."""
    packing.main()
    printed = capsys.readouterr().out.split("\n")
    drawn = [line for line in packing.__doc__.split("\n") if "█" in line]
    assert len(drawn) == 13
    for ours, theirs in zip(drawn, printed[3:]):
        seen = [i for i, letter in enumerate(ours[10:36:2]) if letter == "█"]
        assert seen == [i for i in range(13) if theirs[10 + 3 * i : 12 + 3 * i].strip() == "█"]
