"""The packed tree against rows one by one: visibility, log-probabilities, gradients, and how trees
are cut into micro-batches."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import END, VOCABULARY
from test_mgrpo import scripted_rollout
from torch.nn.attention.flex_attention import flex_attention

from engine import packing, threads
from engine.packing import (
    BLOCK,
    block_mask,
    branch_of,
    compiled_flex,
    flex_attention_for,
    level_attention_for,
    microbatches,
    pack_trees,
    pad_rows,
    padded_logprobs,
    path_places,
    place_segments,
    tree_logprobs,
    whole_trees,
)
from engine.shapes import rounded
from mgrpo import MGRPO, loss_inputs, policy_loss
from model import GPT, ModelConfig

WITHOUT_LIMIT = 10**9


def random_layers(rng, depth, questions=3, most=9):
    """Layers of a rollout that nobody sampled: ragged, some answers without a correction, some rows
    of one token, some truncated rows."""
    words = lambda count: [rng.randrange(VOCABULARY) for _ in range(count)]
    layers, prompts, parents = [], [words(rng.randint(1, most)) for _ in range(questions)], None
    for number in range(1, depth + 1):
        n = rng.randint(1, 3)
        sampled = [words(rng.randint(1, most)) for _ in range(n * len(prompts))]
        rows = torch.arange(len(prompts)) if parents is None else parents
        completions = SimpleNamespace(prompts=prompts, n=n, sampled=sampled)
        layers.append(
            SimpleNamespace(
                number=number,
                completions=completions,
                parents=rows.repeat_interleave(n),
                given=None,
            )
        )
        continued = sorted(rng.sample(range(len(sampled)), rng.randint(1, len(sampled))))
        ended = [rng.random() < 0.5 for _ in continued]
        prompts = [
            prompts[row // n]
            + (sampled[row][:-1] if end else sampled[row])
            + words(rng.randint(1, 4))
            for row, end in zip(continued, ended)
        ]
        parents = torch.tensor(continued)
    return layers


def branches_of(layers, rng=None, share=1.0):
    """All rows, or a share of them, as branches."""
    return [
        branch_of(layers, layer.number, row)
        for layer in layers
        for row in range(len(layer.completions.sampled))
        if rng is None or rng.random() < share
    ]


def whole_pack(branches):
    """The branches of one micro-batch without a limit, in its order."""
    (batch,) = microbatches(branches, WITHOUT_LIMIT)
    return batch


def row_tokens(branch):
    c = branch.layer.completions
    return c.prompts[branch.row // c.n], c.sampled[branch.row]


def length(branch):
    return sum(map(len, row_tokens(branch)))


def padded(branches):
    """The same rows as a PaddedBatch."""
    return pad_rows(*map(list, zip(*map(row_tokens, branches))), "cpu")


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


def one_by_one(model, branches, weights):
    """Log-probabilities of each row from a forward pass of its own, and the gradient of their
    weighted sum."""
    model.zero_grad()
    logps = []
    for branch, weight in zip(branches, weights):
        prompt, sampled = row_tokens(branch)
        logits = model(torch.tensor([prompt + sampled]))[0] @ model.head.weight.T
        predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]  # [T, V]
        logp = predicted.gather(1, torch.tensor(sampled)[:, None])[:, 0]
        (weight * logp.sum()).backward()
        logps.append(logp.detach())
    return logps, gradient(model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- padded rows, the oracle ---------------------------------------------------------------------


def test_padded_rows_score_exactly_the_sampled_tokens(gpt):
    """Catches the off-by-one of every GRPO script, and loss on the copied answer or the phrase.

    Layer 2 by hand: question 5 6, answer 7 8, phrase 9, correction 10 11 end. Only the last three
    may carry a gradient.
    """
    rows = pad_rows([[5, 6, 7, 8, 9], [5]], [[10, 11, END], [12, END]], "cpu")
    assert rows.mask.tolist() == [[True, True, True], [True, True, False]]
    logp, entropy = padded_logprobs(gpt, rows)
    full = gpt(torch.tensor([[5, 6, 7, 8, 9, 10, 11, END]]))
    expected = (full @ gpt.head.weight.T).log_softmax(-1)[0]
    sampled = torch.stack([expected[4, 10], expected[5, 11], expected[6, END]])
    torch.testing.assert_close(logp[0], sampled)
    torch.testing.assert_close(entropy[0, 0], -(expected[4].exp() * expected[4]).sum())
    assert logp[1, 2] == 0 and entropy[1, 2] == 0


def test_the_end_token_is_trained(gpt):
    """Catches a mask that stops before the end token: the model would never learn to stop. Its
    logit must get a gradient."""
    gradients = []
    for completion in ([10, END], [10]):
        gpt.zero_grad()
        rows = pad_rows([[5, 6]], [completion], "cpu")
        logp, _ = padded_logprobs(gpt, rows)
        policy_loss(logp, logp.detach(), torch.tensor([1.0]), rows.mask)[0].backward()
        gradients.append(gpt.embed.weight.grad[END].clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_padding_may_reach_beyond_the_context():
    """Catches a row refused that just fits the context, since S is rounded up: 125 tokens in a
    context of 124 + 1 are padded to 128."""
    torch.manual_seed(0)
    tight, wide = (GPT(ModelConfig(50, 32, 1, 2, 1, 16, 32, context)) for context in (124, 400))
    tight.load_state_dict(wide.state_dict())
    rows = pad_rows([[1] * 100], [[2] * 25], "cpu")
    assert rows.tokens.shape[1] == 128 and rows.real_tokens == 125
    for ours, theirs in zip(padded_logprobs(tight, rows), padded_logprobs(wide, rows)):
        torch.testing.assert_close(ours, theirs)


# ---- packed trees --------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_packed_tree_is_its_rows(model, depth, seed):
    """Catches a token that sees a sibling, or not its past; a wrong position; a row's first token
    predicted from the wrong place; a trunk whose gradient lacks a branch: log-probabilities to
    1e-5, gradients to 1e-5 of their size, against rows one by one and padded."""
    rng = random.Random(f"{depth}/{seed}")
    branches = whole_pack(branches_of(random_layers(rng, depth), rng, 0.7))
    weights = [rng.uniform(-1, 1) for _ in branches]
    expected, slope = one_by_one(model, branches, weights)
    oracle, oracle_entropy = padded_logprobs(model, padded(branches))
    model.zero_grad()
    logp, entropy = tree_logprobs(model, pack_trees(branches))
    (logp.sum(1) * torch.tensor(weights)).sum().backward()
    for row, wanted in zip(logp, expected):
        torch.testing.assert_close(row[: len(wanted)].detach(), wanted, atol=1e-5, rtol=1e-5)
        assert (row[len(wanted) :] == 0).all()
    assert (gradient(model) - slope).norm() < 1e-5 * slope.norm()
    torch.testing.assert_close(logp, oracle, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, oracle_entropy, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_as_rows(model):
    """Catches sums of a trunk's gradients that lose more than rounding: against fp32, a tree in
    bf16 errs no more than twice as much as its rows in bf16."""
    branches = whole_pack(branches_of(random_layers(random.Random(1), 2, questions=4)))
    _, exact = one_by_one(model, branches, [1.0] * len(branches))
    model.compute, errors = torch.bfloat16, []
    passes = (
        lambda: tree_logprobs(model, pack_trees(branches)),
        lambda: padded_logprobs(model, padded(branches)),
    )
    for logprobs in passes:
        model.zero_grad()
        logprobs()[0].sum().backward()
        errors.append((gradient(model) - exact).norm() / exact.norm())
    assert errors[0] < 2 * errors[1] and errors[1] < 0.1


@pytest.mark.parametrize("shape", [(2,), (2, 2), (2, 2, 2)])
def test_loss_is_on_sampled_tokens_alone(encoding, gpt, shape):
    """Catches a copied answer, a phrase or padding in the loss of any layer, and an end token left
    out of it: a rollout through pack, log-probabilities and targets, against each row's own pass."""
    layers, _, _ = scripted_rollout(encoding, shape)
    pack = pack_trees(whole_pack(branches_of(layers)))
    logp, _ = tree_logprobs(gpt, pack)
    assert [layer.number for layer, _, _ in pack.layers] == [1, 2, 3][: len(shape)]
    loss, masks = 0, torch.zeros(logp.shape, dtype=torch.bool)
    for layer, places, rows in pack.layers:
        old, advantages, mask, _ = loss_inputs(layer, rows)
        T = mask.shape[1]
        assert mask.sum(1).tolist() == layer.lengths[rows].tolist()
        for place, row in zip(places.tolist(), rows.tolist()):
            c = layer.completions
            prompt, sampled = c.prompts[row // c.n], c.sampled[row]
            assert sampled[-1] == END
            logits = gpt(torch.tensor([prompt + sampled]))[0] @ gpt.head.weight.T
            full = logits.log_softmax(-1)[len(prompt) - 1 :]
            expected = [full[t, token].item() for t, token in enumerate(sampled)]
            assert logp[place, : len(sampled)].tolist() == pytest.approx(expected, abs=1e-4)
        masks[places, :T] = mask & (advantages != 0)[:, None]
        loss = loss + policy_loss(logp[places, :T], old, advantages, mask)[0]
    (grad,) = torch.autograd.grad(loss, logp)
    # ratios are far below the clip, so a row with a negative advantage has no gradient
    falls = torch.zeros(len(grad), dtype=torch.bool)
    for layer, places, rows in pack.layers:
        falls[places] = layer.advantages[rows] < 0
    assert ((grad != 0) == (masks & ~falls[:, None])).all() and masks.any()


def test_targets_keep_the_samplers_numbers(encoding):
    """Catches rows that get out of step with their log-probabilities or advantages when they are
    reordered."""
    (first, second), _, _ = scripted_rollout(encoding)
    numbered = torch.arange(8.0)[:, None].expand(8, second.completions.tokens.shape[1])
    second.completions.logprobs = numbered.clone()
    branches = [branch_of([first, second], 2, row) for row in (6, 0, 2)]
    (layer, places, rows), *others = pack_trees(branches).layers
    assert rows.tolist() == [6, 0, 2] and places.tolist() == [0, 1, 2] and not others
    old, advantages, *_ = loss_inputs(layer, rows)
    assert old[:, 0].tolist() == [6, 0, 2]
    assert advantages.tolist() == second.advantages[[6, 0, 2]].tolist()


def cuda_only():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.cuda
def test_a_pass_never_synchronises(monkeypatch):
    """Catches a copy or a number asked for in the middle of a micro-batch, for which the host would
    wait: torch raises on any."""
    cuda_only()
    import train

    torch.manual_seed(0)
    gpt = GPT(ModelConfig(VOCABULARY, width=64, depth=2, heads=2, head_size=32, context=256)).cuda()
    layers = random_layers(random.Random(0), 2, questions=8)
    for layer in layers:
        sampled = layer.completions.sampled
        layer.lengths = torch.tensor([len(row) for row in sampled])
        layer.advantages, layer.token_weights = torch.ones(len(sampled)), None
        layer.mask = torch.arange(int(layer.lengths.max())) < layer.lengths[:, None]
        zeros = torch.zeros(len(sampled), int(layer.lengths.max()))
        layer.completions.tokens = layer.completions.logprobs = zeros.cuda()
    config = train.Config(layer_weights=(1.0, 1.0))
    for mode in ("default", "error"):  # the first compiles, and copies what is made once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            pack = pack_trees(whole_pack(branches_of(layers)), "cuda")
            rest = ({1: 8, 2: 16}, MGRPO, 0.0, config, True)
            train.batch_loss(gpt, None, pack, *rest)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_every_token_is_packed_once():
    """Catches a trunk that is carried twice, which would be slower and go unseen."""
    branches = branches_of(random_layers(random.Random(0), 3))
    pack = pack_trees(whole_pack(branches))
    segments = {}
    for branch in branches:
        for key, tokens in branch.path:
            segments[key] = max(len(tokens), segments.get(key, 0))
    assert pack.real_tokens == sum(segments.values()) < sum(map(length, branches)) / 2
    assert pack.real_tokens <= len(pack.tokens) <= 1.125 * pack.real_tokens


@pytest.mark.parametrize("seed", range(4))
def test_two_comparisons_find_ancestors(seed):
    """Catches an interval one too long or short: `k <= i < visible_until[k]` against a search up
    the tree, padding included."""
    branches = whole_pack(branches_of(random_layers(random.Random(seed), 3)))
    pack, segments = pack_trees(branches), place_segments(branches).values()
    S = len(pack.tokens)
    wanted = torch.eye(S, dtype=torch.bool)
    for segment in segments:
        above = path_places(segment)
        for i in range(len(segment.tokens)):
            place = segment.start + i
            wanted[place, [*above, *range(segment.start, place + 1)]] = True
            assert pack.positions[place] == len(above) + i
    assert torch.equal(visible(pack), wanted)


def visible(pack):
    """[S, S] bool: whether query i sees key k, by the two comparisons."""
    i = torch.arange(len(pack.tokens))
    return (i[None] <= i[:, None]) & (i[:, None] < pack.visible_until[None])


def blockwise(pack):
    """The pack, padded to a whole number of blocks as on CUDA."""
    until = pack.visible_until
    more = torch.arange(len(until) + 1, len(until) + 1 + -len(until) % BLOCK)
    return SimpleNamespace(
        tokens=torch.cat([pack.tokens, torch.zeros_like(more)]),
        visible_until=torch.cat([until, more]),
        chunks=pack.chunks,
        real_tokens=pack.real_tokens,
    )


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_the_mask(seed):
    """Catches a block that is left out though something in it is visible, and one taken for full
    though something is not."""
    layers = random_layers(random.Random(seed), 3, questions=2, most=300)
    pack = blockwise(pack_trees(whole_pack(branches_of(layers))))
    blocks = len(pack.tokens) // BLOCK
    share = visible(pack).view(blocks, BLOCK, blocks, BLOCK).float().mean((1, 3))
    mask, found = block_mask(pack), torch.zeros_like(share)
    for counts, indices, value in (
        (mask.kv_num_blocks, mask.kv_indices, 0.5),
        (mask.full_kv_num_blocks, mask.full_kv_indices, 1.0),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            found[row, indices[0, 0, row, :count].long()] = value
    expected = torch.where(share == 0, 0.0, torch.where(share == 1, 1.0, 0.5))
    assert torch.equal(found, expected) and {0.0, 0.5, 1.0} == set(found.flatten().tolist())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_is_level_attention(seed, device):
    """Catches heads, types or scales that FlexAttention takes otherwise than attention level by
    level, on packs of several blocks; on CUDA its gradients too (it has none on a CPU, where
    nothing but this test calls it)."""
    if device == "cuda":
        cuda_only()
    layers = random_layers(random.Random(seed), 3, questions=6, most=40)
    plain = pack_trees(whole_pack(branches_of(layers)))
    pack = blockwise(plain)
    generator, S = torch.Generator().manual_seed(seed), len(pack.tokens)
    assert S % BLOCK == 0 and S > 3 * BLOCK
    qkv = [torch.randn(1, S, heads, 16, generator=generator) for heads in (4, 2, 2)]
    on_device = SimpleNamespace(visible_until=pack.visible_until.to(device))
    attention = compiled_flex() if device == "cuda" else flex_attention
    results, real = [], pack.real_tokens
    for attend, place, length in (
        (level_attention_for(plain), "cpu", len(plain.tokens)),
        (flex_attention_for(on_device, attention), device, S),
    ):
        inputs = [x[:, :length].to(place).clone().requires_grad_(device == "cuda") for x in qkv]
        out = attend(0, *inputs)[:, :real]
        if device == "cuda":
            out.square().sum().backward()
        gradients = [x.grad[:, :real].cpu() for x in inputs if device == "cuda"]
        results.append([out.detach().cpu(), *gradients])
    atol, rtol = (1e-5, 1e-4) if device == "cpu" else (1e-2, 1e-2)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


# ---- micro-batches -------------------------------------------------------------------------------


def test_micro_batches_hold_every_row_once_and_keep_the_limit():
    """Catches rows lost where a micro-batch ends, and one beyond the limit that could have been
    two."""
    branches = branches_of(random_layers(random.Random(3), 3, questions=9))
    names = lambda batch: [branch.path[-1][0] for branch in batch]
    for limit in (1, 60, 200, WITHOUT_LIMIT):
        batches = microbatches(branches, limit)
        assert sorted(name for batch in batches for name in names(batch)) == sorted(names(branches))
        assert all(pack_trees(batch).real_tokens <= limit or len(batch) == 1 for batch in batches)
        assert limit > 1 or len(batches) == len(branches)
    assert len(batches) == 1 and microbatches([], 60) == []


def test_a_tree_cut_in_two_has_the_same_gradient(model):
    """Catches a trunk that is missing in the second half of a tree too large for one
    micro-batch."""
    branches = branches_of(random_layers(random.Random(5), 3, questions=2))
    results = []
    for limit in (WITHOUT_LIMIT, 40, 1):
        model.zero_grad()
        batches = microbatches(branches, limit)
        for batch in batches:
            tree_logprobs(model, pack_trees(batch))[0].sum().backward()
        results.append((len(batches), gradient(model)))
    assert results[0][0] == 1 < results[1][0] < results[2][0] == len(branches)
    assert all((other - results[0][1]).norm() < 1e-5 * other.norm() for _, other in results[1:])


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_parts_on_threads_have_the_same_gradient(model, cores, monkeypatch):
    """Catches a part that is lost, weighted or counted twice, a gradient that replaces the one of
    the micro-batch before, and parts whose number depends on the cores where it must not."""
    branches = branches_of(random_layers(random.Random(5), 3, questions=7))
    halves = whole_trees(branches, 2)  # two micro-batches, of three trees and more
    loss_of = lambda pack: (tree_logprobs(model, pack)[0].sum(), pack.real_tokens)
    model.zero_grad()
    tree_logprobs(model, pack_trees(whole_pack(branches)))[0].sum().backward()
    whole = gradient(model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    model.zero_grad()
    with threads.apart(model):
        counts = [len(packing.backward(model, half, loss_of)) for half in halves]
        assert packing.backward(model, [], lambda pack: (0 * loss_of(pack)[0], "none")) == ["none"]
    assert (gradient(model) - whole).norm() < 1e-5 * whole.norm()
    assert counts == [max(2, cores)] * 2 and threads.count == 1 and threads.pool is None
    monkeypatch.setattr(threads, "SMALL", 0)  # a large model
    with threads.apart(model):
        assert threads.count == 1 and len(packing.backward(model, halves[0], loss_of)) == 1


def test_parts_of_a_batch_hold_whole_trees_of_about_equal_size():
    """Catches a tree in two parts, whose trunk would be computed twice, and one part that is left
    with most of the work."""
    branches = branches_of(random_layers(random.Random(1), 2, questions=40))
    parts = whole_trees(branches, 3)
    roots = [{branch.path[0][0] for branch in part} for part in parts]
    costs = [sum(len(branch.sampled) for branch in part) for part in parts]
    assert len(parts) == 3 and sum(map(len, parts)) == len(branches)
    assert not (roots[0] & roots[1] | roots[0] & roots[2] | roots[1] & roots[2])
    assert max(costs) < 1.1 * min(costs)
    assert whole_trees(branches[:1], 3) == [branches[:1]] and whole_trees([], 2) == [[]]


def test_shapes_of_matrix_products_come_again(monkeypatch):
    """Catches a size that is not rounded: in bf16 every new shape costs time and memory on a CPU.
    Packs of any size multiply matrices of far fewer shapes than they would."""
    assert [rounded(n) for n in (0, 1, 8, 9, 17, 1000)] == [0, 1, 8, 10, 20, 1024]
    assert [rounded(n, 8) for n in (15, 17, 1000, 1025)] == [15, 18, 1024, 1152]
    assert all(n <= rounded(n) <= 1.25 * n + 1 for n in range(3000))

    def shapes(size):
        monkeypatch.setattr(packing, "rounded", size)
        found = set()
        for seed in range(200):
            rng = random.Random(seed)
            branches = branches_of(random_layers(rng, 2, questions=rng.randint(20, 60)))
            pack = pack_trees(whole_pack(branches))
            found |= {("S", len(pack.tokens)), ("M", len(pack.source))}
            found |= {(len(own), own.shape[1], above.shape[1]) for own, above in pack.chunks}
        return len(found)

    assert shapes(rounded) < shapes(lambda size, sizes=4: size) / 3


@pytest.mark.parametrize("given", ["", "77"])
def test_shapes_keep_the_caches_of_compiled_products_small(given):
    """Catches a long run whose memory grows with every new shape (half a megabyte each), and a
    limit of the user's that is overwritten."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: x for name, x in os.environ.items() if name not in names}
    environment |= dict.fromkeys(names, given) if given else {}
    code = f"import train, os; print(*map(os.environ.get, {names}))"
    words = [sys.executable, "-c", code]
    root = Path(packing.__file__).parents[1]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [given or "32", given or "512"], done.stderr


def test_a_pack_of_nothing_takes_part(model):
    """Catches a rank without rows that cannot make the pass which the others wait for."""
    pack = pack_trees([])
    logp, _ = tree_logprobs(model, pack)
    (0 * logp.sum()).backward()
    assert pack.layers == [] and gradient(model).abs().max() == 0


def test_the_docstring_draws_what_the_code_does(capsys):
    """Catches a picture at the top of the file that is not what the code computes."""
    packing.main()
    printed = capsys.readouterr().out.splitlines()
    titles = ("packed", "position", "visible_until")
    lines = packing.__doc__.splitlines()
    rows = [next(x for x in lines if re.search(rf"{title} +[q\d]", x)) for title in titles]
    first = rows[0].index("q q q")  # the columns are two characters wide
    for row, line in zip(rows, printed):
        cells, values = [row[first + 2 * i :][:2].strip() for i in range(13)], line.split()[1:]
        # "." repeats the number before it
        assert [values[i - 1] if x == "." else x for i, x in enumerate(cells)] == values
    squares = [
        [i for i in range(13) if "█" in line[15 + 3 * i : 18 + 3 * i]] for line in printed[3:]
    ]
    assert squares[5] == [0, 1, 2, 3, 4, 5]  # w: the question and its own answer
    assert squares[8] == [0, 1, 2, 3, 4, 5, 8]  # y: not its sibling x
    assert squares[11] == [0, 1, 2, 11]  # b: not the other answer
