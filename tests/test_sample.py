"""The sampler: the same distribution, the same numbers and the same tokens as the model says,
however rows are batched."""

import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import END, VOCABULARY

from engine import cuda_graphs, in_flight, kernels, workers
from engine.cache import PrefillAttention, SlotPool
from engine.cuda_cache import CudaCache
from engine.cuda_graphs import StepGraphs
from engine.in_flight import RowState
from engine.kernels import members_for
from engine.keys import (
    exponential_from_bits,
    exponential_noise,
    hash_seed,
    mix,
    position_keys,
    row_keys,
)
from engine.packing import pad_rows, padded_logprobs
from engine.shapes import rounded
from engine.workers import RemoteCache, in_parallel
from model import GPT, ModelConfig, scaled_logits
from sample import Sampler, filtered

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def gpt(request, gpt):
    """conftest's model, whose rows end now and then (two in five of 40 tokens), on each device: on
    CUDA the sampler runs on kernels and graphs."""
    with torch.no_grad():
        gpt.embed.weight[END] *= 3
    return gpt.to(request.param)


def phrases_for(rows):
    return [[5, 6, 7][: 1 + i % 3] for i in range(rows)]


def seated(n, most=1, end_tokens=(), device="cpu"):
    """n rows in flight that have sampled nothing, with results of `most` tokens."""
    rows = RowState.blank(n, 0, end_tokens, device)
    rows.tokens, rows.logprobs = (
        torch.zeros(n, most + 1, dtype=torch.long, device=device),
        torch.zeros(n, most + 1, device=device),
    )
    rows.row.copy_(torch.arange(n))
    rows.limit.fill_(most)
    rows.alive.fill_(True)
    return rows


def choose_torch(logits, temperature, rows):
    """What a decode step does without the kernel."""
    columns = torch.arange(rows.tokens.shape[1], device=rows.key.device)
    rows.position_keys = torch.zeros(rows.tokens.shape, dtype=torch.int32, device=rows.key.device)
    rows.position_keys[rows.row] = position_keys(rows.key[:, None], columns)
    rows.advance(*kernels.choose_torch(logits, temperature, rows))


def worst_gap(gpt, c):
    """max |sampler's log-prob - teacher-forced log-prob| over all rows of c."""
    rows = pad_rows(
        [c.prompts[i // c.n] for i in range(len(c))], c.sampled, gpt.embed.weight.device
    )
    logp, _ = padded_logprobs(gpt, rows)
    return (logp - c.logprobs[:, : logp.shape[1]])[rows.mask].abs().max().item()


# ---- random numbers ------------------------------------------------------------------------------


def test_the_hash_equals_its_definition_in_unsigned_arithmetic():
    """Catches a sign bit smeared by >> on signed tensors, and a product that does not wrap: numpy's
    uint32 is the oracle."""
    x = np.array(
        [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789, 0xDEADBEEF], dtype=np.uint32
    )
    y = x ^ x >> np.uint32(16)
    y = y * np.uint32(0x7FEB352D)
    y = y ^ y >> np.uint32(15)
    y = y * np.uint32(0x846CA68B)
    y = y ^ y >> np.uint32(16)
    assert (
        mix(torch.from_numpy(x.view(np.int32).copy())).numpy().view(np.uint32).tolist()
        == y.tolist()
    )
    assert [mix(int(v)) for v in x] == y.tolist()


def test_the_hash_leaves_its_argument_alone():
    """Catches in-place arithmetic reaching the caller's keys: the second token of a row would draw
    other numbers."""
    x = torch.arange(5, dtype=torch.int32)
    mix(x)
    assert x.tolist() == [0, 1, 2, 3, 4]


def test_noise_is_exponential_and_independent():
    """Catches correlated or clipped noise. Over 4 M draws the mean and variance of Exp(1) are 1 ±
    .0005 and ± .0014: bounds of five standard errors (one false alarm in 1.7 million); the
    correlation of neighbours, rows and positions stays below .0035 (seven)."""
    keys, positions = (
        row_keys(7, torch.arange(2000)).repeat_interleave(5),
        torch.arange(5).repeat(2000),
    )
    at = position_keys(keys, positions)
    draws = exponential_noise(keys, at, 400).view(2000, 5, 400).double()
    assert abs(draws.mean() - 1) < 0.0025 and abs(draws.var() - 1) < 0.007 and draws.min() > 0
    centred = draws - 1
    for a, b in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert abs((a * b).mean()) < 0.0035


@pytest.mark.slow
def test_small_noise_is_as_frequent_as_it_should_be():
    """Catches noise that is coarse near 0, where rare tokens are decided: of 2^28 draws (1 -
    exp(-x)) 2^28 lie below x, from 268,435 at x = 1e-3 to 2.7 at 1e-8. Bounds of four standard
    errors (below ten expected ones: at least 1, at most 25); with steps of 6e-8 three of them fail.
    And all are positive and finite: E = 0 wins at ANY probability, E = inf loses to a token that
    cannot come."""
    below, xs = [0] * 6, (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    for first in range(0, 2**12, 2**4):
        keys = row_keys(3, torch.arange(first, first + 2**4))
        at = position_keys(keys, torch.full((2**4,), first))
        draws = exponential_noise(keys, at, 2**16)
        assert draws.min() > 0 and draws.max() < 17
        small = draws[draws < xs[0]]
        below = [count + int((small < x).sum()) for count, x in zip(below, xs)]
    for x, count in zip(xs, below):
        expected = -math.expm1(-x) * 2**28
        assert abs(count - expected) < 4 * expected**0.5 if expected > 10 else 1 <= count <= 25, (
            x,
            count,
            expected,
        )


def test_the_smallest_noise_is_uniform():
    """Catches steps between the smallest draws, of which no number of draws that a test can afford
    would tell: the 16 integers nearest to 0, each with 100,000 rows' keys. E 2^31 is then uniform
    on (0, 8): chi-square over 64 equal parts, and over 64 parts of (0, 2^-6) (63 degrees of
    freedom, bound 120: p < 2e-5), and at the very ends of bits and keys E is neither 0 nor
    infinite."""
    keys, bits = row_keys(1, torch.arange(100_000)), torch.arange(-8, 8, dtype=torch.int32)
    draws = exponential_from_bits(bits.expand(len(keys), -1), keys).double().flatten() * 2**31
    for top in (8, 2**-6):
        counts = draws[draws < top].mul(64 / top).long().bincount(minlength=64)
        expected = len(keys) * 2 * top / 64
        assert len(counts) == 64 and ((counts - expected) ** 2 / expected).sum() < 120
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    draws = exponential_from_bits(ends.expand(6, -1), ends)
    assert draws.min() > 0 and draws.max() < 17


def test_seeds_of_different_steps_differ():
    """Catches seed + step, which makes step 1 of seed 0 the step 0 of seed 1."""
    seen = {hash_seed(seed, step) for seed in range(50) for step in range(50)} | {
        hash_seed(step) for step in range(50)
    }
    assert len(seen) == 2550 and hash_seed(1, 2) != hash_seed(2, 1)


def test_any_end_token_ends_a_row(gpt):
    """Catches all but the first of a model's end tokens ignored (Llama-3 names three): every row
    stops at the first of them, and stands without it in `ids`."""
    ends = set(range(0, END, 3))
    gpt.config = replace(gpt.config, end_tokens=tuple(ends)[:4])
    for most in (1, 40):
        c = Sampler(gpt).generate([[1, 2], [5]], 50, most, seed=3)
        for sampled, ids, ended in zip(c.sampled, c.ids, c.ended.tolist()):
            stops = [i for i, token in enumerate(sampled) if token in gpt.config.end_tokens]
            assert stops == ([len(sampled) - 1] if ended else []) and ids == (
                sampled[:-1] if ended else sampled
            )
    assert len({sampled[-1] for sampled, ended in zip(c.sampled, c.ended.tolist()) if ended}) > 1


def test_frequencies_match_the_softmax():
    """Catches temperature applied twice or not at all, and a biased choice. Chi-square over 200,000
    draws of an uneven 12-token softmax at temperature 0.7: 11 degrees of freedom, bound 36 (a false
    alarm has p = .0002; the seed is fixed, so it holds or never does)."""
    torch.manual_seed(5)
    logits, n = torch.randn(12) * 1.5, 200_000
    rows = seated(n)
    rows.key.copy_(row_keys(11, torch.arange(n)))
    choose_torch(logits.expand(n, -1), 0.7, rows)
    tokens, logp = rows.tokens[:, 0], rows.logprobs[:, 0]
    expected = (logits / 0.7).softmax(0)
    chi2 = ((tokens.bincount(minlength=12) - n * expected) ** 2 / (n * expected)).sum()
    assert chi2 < 36, chi2
    torch.testing.assert_close(logp[:50], expected.log()[tokens[:50]])


@pytest.mark.slow
def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Catches a tail that is lost (invariant 1: rollouts come from the distribution whose
    log-probabilities are trained). A vocabulary of 151,936, of which one token has 98 % and each of
    the others an equal share of 2 %, 1.3e-7: of 2,000 draws 40 ± 6.3 are of these (bounds: four
    standard errors; with noise that is coarse near 0 they are 8)."""
    n, V = 2000, 151_936
    logits, tail = torch.full((V,), math.log(0.02 / (V - 1))), 0
    logits[77_777] = math.log(0.98)
    for first in range(0, n, 8):
        rows = seated(8)
        rows.key.copy_(row_keys(2, torch.arange(first, first + 8)))
        choose_torch(logits.expand(8, -1), 1.0, rows)
        tail += int((rows.tokens[:, 0] != 77_777).sum())
    assert abs(tail - 0.02 * n) < 4 * (0.02 * 0.98 * n) ** 0.5, tail


def test_a_token_that_cannot_come_never_does():
    """Catches E = inf of the one token that can, and 0/0: with -inf everywhere else, that one is
    drawn whatever its noise, and greedily."""
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, 613] = 5.0
    for temperature in (0.0, 1.0, 0.3):
        for seed in range(50):
            rows = seated(4)
            rows.key.copy_(row_keys(seed, torch.arange(4)))
            choose_torch(logits, temperature, rows)
            assert rows.tokens[:, 0].tolist() == [613] * 4 and not rows.logprobs.any()


# ---- agreement with the model --------------------------------------------------------------------


def test_logprobs_equal_the_trainers(gpt, random_prompts):
    """THE failure of RL code with two engines. Both layers and a third, ragged prompts, rows
    leaving: max gap < 1e-4 in fp32."""
    sampler = Sampler(gpt)
    first = sampler.generate(random_prompts, 4, 40, seed=3)
    second = sampler.extend(first, phrases_for(len(first)), 3, 40, seed=3)
    some = torch.arange(0, len(second), 2)
    third = sampler.extend(second, phrases_for(len(some)), 2, 20, seed=3, rows=some)
    assert 0 < int(second.ended.sum()) < len(second), (
        "rows must both end and be cut, or this proves less than it says"
    )
    for completions in (first, second, third):
        assert worst_gap(gpt, completions) < 1e-4
    assert third.parents.tolist() == some.repeat_interleave(2).tolist()


@torch.no_grad()
def test_each_token_is_the_one_that_its_own_noise_chooses(gpt, random_prompts):
    """Catches the noise of another seed, layer, row or position: a sampler that used it would still
    be unbiased, and equal to itself."""
    sampler, device = Sampler(gpt), gpt.embed.weight.device
    first = sampler.generate(random_prompts, 2, 12, seed=3, first_row=5)
    for c in (first, sampler.extend(first, phrases_for(len(first)), 2, 12, seed=3)):
        keys = row_keys(hash_seed(3, c.layer), c.numbers)
        for i, key in enumerate(keys.split(1)):
            prompt, sampled = c.prompts[i // c.n], c.sampled[i]
            hidden = gpt(torch.tensor([prompt + sampled], device=device))[0, len(prompt) - 1 : -1]
            p = scaled_logits(hidden, gpt.head.weight).softmax(-1)  # [T, V]
            at = position_keys(key, torch.arange(len(sampled), device=device))
            assert (exponential_noise(key, at, VOCABULARY) / p).argmin(-1).tolist() == sampled
    assert first.numbers.tolist()[0] == 5


def test_temperature_is_in_the_logprobs(gpt, random_prompts):
    """Catches log-probabilities of the untempered model: at 0.5 they differ by whole nats from
    those that rollouts were drawn from."""
    c = Sampler(gpt).generate(random_prompts, 2, 12, temperature=0.5, seed=1)
    rows = pad_rows([c.prompts[i // 2] for i in range(len(c))], c.sampled, gpt.embed.weight.device)
    logp, _ = padded_logprobs(gpt, rows, 0.5)
    plain, _ = padded_logprobs(gpt, rows)
    assert (
        (logp - c.logprobs)[rows.mask].abs().max()
        < 1e-4
        < (plain - c.logprobs)[rows.mask].abs().max()
    )


def test_extend_equals_a_fresh_prompt(gpt, random_prompts):
    """Catches a wrong position, mask or order in the reused cache: extending must give, token for
    token, what sampling afresh from question + attempt + phrase gives. The rows' random numbers are
    made equal by drawing greedily."""
    sampler = Sampler(gpt)
    first = sampler.generate(random_prompts, 3, 30, seed=3)
    assert not first.ended.all(), (
        "a cut attempt has a last token whose keys are not cached yet: the case must occur"
    )
    phrases = phrases_for(len(first))
    second = sampler.extend(first, phrases, 1, 30, temperature=0)
    fresh = sampler.generate(second.prompts, 1, 30, temperature=0)
    assert (
        second.tokens.tolist() == fresh.tokens.tolist()
        and second.lengths.tolist() == fresh.lengths.tolist()
    )
    torch.testing.assert_close(second.logprobs, fresh.logprobs, atol=1e-4, rtol=0)
    assert [
        c[len(p) :]
        for c, p in zip(second.prompts, (first.prompts[i // 3] for i in range(len(first))))
    ] == [first.ids[i] + phrases[i] for i in range(len(first))]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_prefill_behind_a_path_equals_the_whole_sequence(kv_heads):
    """Catches keys of another row's path, a layer of the path left out, a new token that sees
    padding or a later token: in a tree of three layers in one store, where siblings differ in
    number and length, the vectors of the last new tokens are those of a pass over the whole text.
    (On CUDA a path has several segments; on a CPU the sampler gives each row a single one.)"""
    torch.manual_seed(0)
    config = ModelConfig(VOCABULARY, depth=2, heads=4, kv_heads=kv_heads)
    gpt, draw = GPT(config), lambda n: torch.randint(VOCABULARY, (n,)).tolist()
    pool = SlotPool(config, torch.float32, "cpu", shared=True)
    # Each layer: the row that each of its rows continues, and the lengths of their new tokens.
    layers = [([0, 0, 0], [4, 2, 3]), ([0, 0, 0, 2, 2], [1, 5, 2, 3, 4]), ([0, 3, 4], [2, 6, 1])]
    path, texts = [], [[], [], []]
    for depth, (parents, lengths) in enumerate(layers):
        parents = torch.tensor(parents if depth else [0, 1, 2])
        new = [draw(length) for length in lengths]
        start = torch.tensor([len(texts[parent]) for parent in parents])
        texts = [texts[parent] + tokens for parent, tokens in zip(parents, new)]
        path = [(segments, node[parents]) for segments, node in path]
        # A slot is filled already in the last layer: the first of its new tokens.
        nodes = torch.arange(len(new))
        segments = pool.take(len(new), 8, torch.tensor(lengths))
        for first, last in [(0, 1), (1, None)] if depth == 2 else [(0, None)]:
            part = [tokens[first:last] for tokens in new]
            rows = nodes[torch.tensor([len(tokens) > 0 for tokens in part])]
            part = [part[row] for row in rows]
            count = torch.tensor([len(tokens) for tokens in part])
            filled = torch.full_like(count, first)
            attention = PrefillAttention(
                config, [(s, node[rows]) for s, node in path], segments, rows, filled, count
            )
            width = int(count.max())
            tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in part])
            positions = (start[rows] + first)[:, None] + torch.arange(width)
            with torch.inference_mode():
                hidden = gpt(tokens, positions, attention.attend)
            for found, row, length in zip(hidden, rows.tolist(), count.tolist()):
                seen = int(start[row]) + first + length
                whole = gpt(torch.tensor([texts[row][:seen]]))[0, -1]
                torch.testing.assert_close(found[length - 1], whole, rtol=0, atol=1e-4)
        path.append((segments, nodes))


def test_extending_twice_gives_the_same(gpt, random_prompts):
    """Catches `extend` writing into the cache it was given: a second call on the same attempts
    would see the first one's phrases."""
    sampler = Sampler(gpt)
    first = sampler.generate(random_prompts, 2, 20, seed=3)
    results = [
        sampler.extend(first, phrases_for(len(first)), 2, 20, seed=9).tokens.tolist()
        for _ in range(2)
    ]
    assert results[0] == results[1]


def test_a_row_alone_equals_the_row_in_a_crowd(gpt, random_prompts):
    """Catches random numbers or attention that depend on neighbours: 300 rows together, and each of
    a few alone under its own number."""
    sampler = Sampler(gpt)
    prompts = (random_prompts * 22)[:150]
    crowd = sampler.generate(prompts, 2, 25, seed=8)
    for i in (0, 1, 77, 150, 299):
        alone = sampler.generate([prompts[i // 2]], 1, 25, seed=8, first_row=i)
        assert (
            alone.tokens[0, : alone.lengths[0]].tolist()
            == crowd.tokens[i, : crowd.lengths[i]].tolist()
        )


def test_a_correction_alone_equals_the_correction_in_a_crowd(gpt, random_prompts):
    """The same one level down: a few attempts extended alone draw what they drew among all."""
    sampler = Sampler(gpt)
    first = sampler.generate(random_prompts, 3, 15, seed=8)
    crowd = sampler.extend(first, [[5, 6]] * len(first), 2, 20, seed=8)
    for row in (0, 7, 20):
        alone = sampler.extend(first, [[5, 6]], 2, 20, seed=8, rows=[row])
        width = alone.tokens.shape[1]
        assert alone.tokens.tolist() == crowd.tokens[2 * row : 2 * row + 2, :width].tolist()
        assert alone.lengths.tolist() == crowd.lengths[2 * row : 2 * row + 2].tolist()


def test_siblings_and_layers_draw_different_numbers(gpt):
    """Catches a group of identical answers (no signal at all), and layer 2 repeating layer 1's
    noise."""
    sampler = Sampler(gpt)
    first = sampler.generate([[1, 2, 3]], 8, 12, seed=1)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 8
    second = sampler.extend(first, [[4]] * 8, 8, 12, seed=1)
    assert len({tuple(row) for row in second.tokens.tolist()}) == 64


def test_equal_seeds_repeat_and_different_seeds_differ(gpt):
    """Catches an ignored seed, and one that is not enough: equal seeds repeat, different ones
    differ."""
    sampler = Sampler(gpt)
    a, b, c = (sampler.generate([[1, 2, 3]], 4, 12, seed=s).tokens.tolist() for s in (1, 1, 2))
    assert a == b != c


def test_ended_rows_have_their_end_token_and_nothing_behind_it(gpt, random_prompts):
    """Catches an end token left out of length or log-probs, tokens after the end, and a wrong ended
    flag."""
    c = Sampler(gpt).generate(random_prompts, 100, 40, seed=2)
    assert 10 < int(c.ended.sum()) < len(c) - 10
    for i in range(len(c)):
        n, row = int(c.lengths[i]), c.tokens[i]
        assert (row[n - 1] == END) == bool(c.ended[i]) and END not in row[: n - 1].tolist()
        assert (
            not row[n:].any()
            and not c.logprobs[i, n:].any()
            and bool((c.logprobs[i, :n] < 0).all())
        )
        assert c.ended[i] or n == 40
        assert c.ids[i] == [t for t in row[:n].tolist() if t != END]


def test_rows_in_flight_come_in_few_sizes(gpt, random_prompts):
    """Catches rows that leave one by one: in bf16 each new number of rows costs time and memory on
    a CPU. Every row is counted once as it leaves, though some that have ended stay a while."""
    sampler, sizes, left = Sampler(gpt), [], []
    sampler.seen = lambda rows, count: (sizes.append(len(rows.token)), left.append(count))
    c = sampler.generate(random_prompts, 100, 40, seed=2)
    assert sum(left) == len(c) and len(set(sizes)) > 2
    assert all(size == rounded(size) for size in set(sizes) - {len(c)})


def test_greedy_is_the_argmax(gpt):
    """Catches noise at temperature 0: every token must be the model's most likely one."""
    c = Sampler(gpt).generate([[1, 2, 3], [7]], 1, 15, temperature=0)
    for i, prompt in enumerate(([1, 2, 3], [7])):
        ids = prompt + c.tokens[i, : c.lengths[i]].tolist()
        best = (
            gpt(torch.tensor([ids], device=gpt.embed.weight.device))[0] @ gpt.head.weight.T
        ).argmax(-1)
        assert best[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :]


def test_refresh_takes_new_weights(gpt):
    """Catches a sampler that goes on drawing from the policy of the first step."""
    sampler = Sampler(gpt)
    before = sampler.generate([[1, 2, 3]], 1, 8, temperature=0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    stale = sampler.generate([[1, 2, 3]], 1, 8, temperature=0)
    sampler.refresh()
    fresh = sampler.generate([[1, 2, 3]], 1, 8, temperature=0)
    assert (
        stale.tokens.tolist() == before.tokens.tolist() != fresh.tokens.tolist()
        and worst_gap(gpt, fresh) < 1e-4
    )


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("switches", [{}, dict(qkv_bias=True, qk_norm=True, tied=False)])
def test_logprobs_equal_the_trainers_in_every_shape_of_model(
    heads, kv_heads, switches, random_prompts
):
    """Catches query heads meeting the wrong key head, and switches that only the trainer knows."""
    torch.manual_seed(1)
    gpt = GPT(
        ModelConfig(VOCABULARY, 48, 2, heads, kv_heads, 16, 64, 128, end_tokens=(END,), **switches)
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    c = Sampler(gpt).generate(random_prompts, 2, 10, seed=4)
    assert worst_gap(gpt, Sampler(gpt).extend(c, phrases_for(len(c)), 2, 10, seed=4)) < 1e-4


def test_bf16_logprobs_stay_near_the_trainers(random_prompts):
    """The bf16 sampler against the bf16 trainer: they round alike, so the mean gap stays below 0.01
    nats (fp32: 1e-6)."""
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(VOCABULARY, 64, 3, 4, 1, 16, 96, 128, end_tokens=(END,)), torch.bfloat16)
    c = Sampler(gpt).generate(random_prompts, 4, 30, seed=1)
    rows = pad_rows(
        [c.prompts[i // 4] for i in range(len(c))],
        [c.tokens[i, : c.lengths[i]].tolist() for i in range(len(c))],
        "cpu",
    )
    assert (padded_logprobs(gpt, rows)[0] - c.logprobs)[rows.mask].abs().mean() < 0.01
    assert c.logprobs.dtype == torch.float32 and math.isfinite(c.logprobs.sum())


# ---- memory, and other ways to run ---------------------------------------------------------------


def test_workers_sample_what_one_process_does(gpt, random_prompts):
    """Catches rows under another's number, attempts sent to a process that has not their keys, and
    stale weights in the others' memory: generate, extend on some rows, extend that, twice over,
    with new weights between."""
    if gpt.embed.weight.is_cuda:
        pytest.skip("workers are for CPUs")
    prompts, alone, team = random_prompts * 3, Sampler(gpt), in_parallel(Sampler(gpt), 3)
    for step in range(2):
        first, first_alone = (s.generate(prompts, 6, 25, seed=step) for s in (team, alone))
        rows = torch.arange(1, 90, 4)
        second, second_alone = (
            s.extend(c, phrases_for(len(rows)), 2, 15, seed=step, rows=rows)
            for s, c in ((team, first), (alone, first_alone))
        )
        third, third_alone = (
            s.extend(c, [[3]] * 2, 2, 9, seed=step, rows=[0, 45])
            for s, c in ((team, second), (alone, second_alone))
        )
        assert isinstance(first.cache, RemoteCache) and isinstance(third.cache, RemoteCache)
        for ours, single in ((first, first_alone), (second, second_alone), (third, third_alone)):
            for name in ("tokens", "lengths", "ended", "parents", "numbers"):
                assert getattr(ours, name).tolist() == getattr(single, name).tolist(), name
            assert ours.prompts == single.prompts and worst_gap(gpt, ours) < 1e-4
        with torch.no_grad():
            gpt.embed.weight.add_(torch.randn_like(gpt.embed.weight))
        team.refresh()
        alone.refresh()


def test_workers_recover_from_errors_and_interruptions(gpt, random_prompts, monkeypatch):
    """Catches an answer to a call that was broken off taken for that to the next, an error
    swallowed in a process, a process that died waited for, and a cache looked for with processes
    that are gone. After each of them the sampler samples again what it did."""
    if gpt.embed.weight.is_cuda:
        pytest.skip("workers are for CPUs")
    sampler = in_parallel(Sampler(gpt), 2)
    first = sampler.generate(random_prompts, 10, 9, seed=5)
    second = sampler.extend(first, phrases_for(70), 1, 5, seed=5).tokens.tolist()
    with pytest.raises(TypeError, match="top_q"):
        sampler.generate(random_prompts, 10, 9, top_q=1)
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.generate([[VOCABULARY]] * 20, 10, 9)
    assert sampler.team is first.cache.team
    with pytest.raises(RuntimeError, match="no_such_call"):
        sampler._call([("no_such_call", (), {})] * 2, [], None, [0, 0, 0])
    assert sampler.generate(random_prompts, 10, 9, seed=5).tokens.tolist() == first.tokens.tolist()
    assert sampler.extend(first, phrases_for(70), 1, 5, seed=5).tokens.tolist() == second
    os.kill(sampler.team.processes[0].pid, signal.SIGKILL)  # as when memory runs out
    with pytest.raises(ChildProcessError, match="has died"):
        sampler.generate(random_prompts, 10, 9)
    monkeypatch.setattr(
        workers, "unpacked", lambda result: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C between two answers
        sampler.generate(random_prompts, 10, 9)
    monkeypatch.undo()
    assert sampler.generate(random_prompts, 10, 9, seed=5).tokens.tolist() == first.tokens.tolist()


def test_workers_drop_the_cache_of_results_that_are_gone(gpt, random_prompts):
    """Catches caches that pile up in the processes, a step's trees after another: when a result
    goes, or all that was copied from it, each process drops it with its next order."""
    if gpt.embed.weight.is_cuda:
        pytest.skip("workers are for CPUs")
    sampler = in_parallel(Sampler(gpt), 2)
    first = sampler.generate(random_prompts, 10, 5)
    copied, team = replace(first), sampler.team
    second = sampler.extend(first, phrases_for(70), 1, 5)
    del first, second
    assert team.dropped == [[2], [2]]
    sampler.extend(copied, [[3]], 1, 5, rows=[0])  # concerns the first process alone
    assert team.dropped[0] == [3] and team.dropped[1] == [2, 3]
    del copied
    assert team.dropped[0] == [3, 1]


def test_samplers_do_not_mix_caches(gpt, random_prompts):
    """Catches another sampler's keys taken for one's own: its results can be extended, from their
    tokens."""
    if gpt.embed.weight.is_cuda:
        pytest.skip("one model on the CPU is enough here")
    other = GPT(gpt.config)
    for count in (1, 2):
        mine, theirs = (in_parallel(Sampler(model), count) for model in (gpt, other))
        first = theirs.generate(random_prompts, 10, 12, seed=1)
        mine.generate(random_prompts, 10, 12, seed=1)
        assert worst_gap(gpt, mine.extend(first, phrases_for(70), 1, 10, seed=1)) < 1e-4


@pytest.mark.parametrize(
    "cache_tokens",
    [pytest.param(24 + 40, marks=pytest.mark.slow), 200, 777, 3000],
)
def test_rows_that_wait_draw_what_they_would_have_drawn(gpt, random_prompts, cache_tokens):
    """Catches the queue: places taken over with something left in them, a row under another's
    number, turns mixed up, a second level on a cache that was dropped. From a cache for one row at
    a time to one that nearly holds all, tokens and lengths are those of unlimited memory."""
    free, tight = Sampler(gpt), Sampler(gpt, cache_tokens=cache_tokens)
    first, first_tight = (s.generate(random_prompts, 6, 40, seed=2) for s in (free, tight))
    assert 0 < int(first.ended.sum()) < len(first) and (first_tight.cache is None) == (
        cache_tokens < 3000
    )
    assert (
        first.tokens.tolist() == first_tight.tokens.tolist() and worst_gap(gpt, first_tight) < 1e-4
    )
    rows = torch.arange(0, len(first), 3)
    if cache_tokens >= 200:
        second, second_tight = (
            s.extend(c, phrases_for(len(rows)), 2, 30, seed=2, rows=rows)
            for s, c in ((free, first), (tight, first_tight))
        )
        assert (
            second.tokens.tolist() == second_tight.tokens.tolist()
            and second.lengths.tolist() == second_tight.lengths.tolist()
        )
        assert second.prompts == second_tight.prompts and worst_gap(gpt, second_tight) < 1e-4


def test_a_pool_at_its_limit_stays_where_it_is():
    """Catches a pool that is moved, and all graphs captured anew, for the sake of no slot more; and
    one that does not grow while it can."""
    pool = SlotPool(ModelConfig(VOCABULARY, depth=1), torch.float32, "cpu", shared=True, limit=100)
    sizes = []
    for slots in (60, 60, 61, 76, 90, 1000, 1000, 101, 30):
        pool.reserve(slots)
        sizes.append((pool.k.shape[1], pool.moves))
    assert sizes == [
        (60, 1),
        (60, 1),
        (75, 2),
        (93, 3),
        (93, 3),
        (100, 4),
        (100, 4),
        (100, 4),
        (100, 4),
    ]
    pool.limit = 80  # what is there is there
    pool.reserve(1000)
    assert pool.k.shape[1] == 100 and pool.moves == 4


def test_graphs_outlive_a_call_that_fills_the_cache(gpt, random_prompts, monkeypatch):
    """Catches graphs captured at every call while rows wait for room (the sampler of CUDA, with
    stand-ins for a step and its capture): after the first generate and extend there is no other
    capture, and the pool lies where it lay."""
    if gpt.embed.weight.is_cuda:
        pytest.skip("counts stand-ins")
    captured = []

    def capture(graphs, step, places):
        captured.append(places)
        return SimpleNamespace(replay=lambda: graphs.logits[:places].fill_(0.0))

    monkeypatch.setattr(StepGraphs, "capture", capture)
    monkeypatch.setattr(kernels, "choose", choose_torch)
    sampler, seen = Sampler(gpt, fused=True, graph=True, cache_tokens=400), []
    for seed in range(4):
        first = sampler.generate(random_prompts, 6, 40, seed=seed)
        sampler.extend(first, phrases_for(42), 2, 20, seed=seed)
        seen.append((len(captured), sampler.pool.moves, sampler.pool.k.data_ptr()))
    assert (
        captured and sampler.pool.k.shape[1] == 400 and first.cache is None and len(set(seen)) == 1
    )


def test_places_of_rows_that_left_are_empty(gpt):
    """Catches places of rows that have left in which something goes on: they would write into the
    cache from a CUDA graph's padded rows."""
    rows = seated(5, most=3)
    rows.slot.copy_(torch.tensor([10, 20, 30, 40, 50]))
    rows.length.copy_(torch.tensor([1, 2, 3, 1, 2]))
    rows.close_up(torch.tensor([False, True, False, True]))
    assert (
        rows.slot.tolist() == [20, 40, -1, -1, 50]
        and rows.length.tolist() == [2, 1, 0, 0, 2]
        and rows.row.tolist()[:2] == [1, 3]
    )
    assert rows.alive.tolist() == [True, True, False, False, True]


def test_tables_of_the_cuda_cache_by_hand():
    """Catches siblings that do not share a line (their keys would be read once a row), a line with
    too many, and lines left over from before: 7 rows below 3 nodes, 8 query heads a key head, so
    2 rows to a line; then 2 rows."""
    config = ModelConfig(VOCABULARY, heads=8, kv_heads=1)
    assert [members_for(heads, 2) for heads in (2, 14, 64)] == [16, 2, 1]
    pool = SlotPool(config, torch.bfloat16, "cpu", shared=True)
    segments = pool.take(3, 5, torch.tensor([4, 5, 2]))
    cache = CudaCache.opened(None, config, pool, [segments], 8, 6)
    rows = cache.rows
    rows.nodes[0][:7] = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    cache.admit(0, 7)
    lines, starts, lengths, used = (x[0] for x in cache.tables)
    assert used == 5 and lines[:5].tolist() == [[0, 1], [2, -1], [3, -1], [4, 5], [6, -1]]
    assert starts[:5].tolist() == [0, 0, 5, 10, 10] and lengths[:5].tolist() == [4, 4, 5, 2, 2]
    assert rows.start[:7].tolist() == [15 + 6 * i for i in range(7)] and cache.vacant == [7]
    rows.nodes[0][:2] = torch.tensor([0, 2])
    cache.retire(torch.tensor([False, True, False, False, False, False, True]), None)
    assert (
        used == 2
        and lines[:2].tolist() == [[0, -1], [1, -1]]
        and lengths[:2].tolist() == [4, 2]
        and cache.vacant == [7, 0, 2, 3, 4, 5]
    )


def test_a_cache_too_small_is_named(gpt):
    """Catches a sampler that loops for ever, or dies inside torch, when not even one row fits."""
    with pytest.raises(ValueError, match="do not fit a cache of 20 tokens"):
        Sampler(gpt, cache_tokens=20).generate([[1, 2, 3]], 2, 30)


@pytest.mark.parametrize(
    "switches", [dict(leave=False), dict(share=False), dict(share=False, leave=False)]
)
def test_switches_change_speed_alone(gpt, random_prompts, switches):
    """Catches a line of bench.py's ladder that samples something else."""
    results = [
        s.generate(random_prompts, 5, 40, seed=2).tokens.tolist()
        for s in (Sampler(gpt), Sampler(gpt, **switches))
    ]
    assert results[0] == results[1]


def test_each_row_has_its_limit(gpt, random_prompts):
    """Catches one limit for all, and rows that write beyond theirs: row i is cut after its own
    number of tokens, or ends before."""
    limits = [1 + 5 * i % 33 for i in range(14)]
    whole, c = (
        Sampler(gpt).generate(random_prompts, 2, 33, seed=2),
        Sampler(gpt).generate(random_prompts, 2, limits, seed=2),
    )
    assert c.lengths.tolist() == [
        min(limit, length) for limit, length in zip(limits, whole.lengths.tolist())
    ]
    for i, length in enumerate(c.lengths.tolist()):
        assert (
            c.tokens[i, :length].tolist() == whole.tokens[i, :length].tolist()
            and not c.tokens[i, length:].any()
        )
    with pytest.raises(ValueError, match="3 limits for 14 rows"):
        Sampler(gpt).generate(random_prompts, 2, [4, 5, 6])


class Late:
    """cuda_graphs.AliveMirror as it is on CUDA, without CUDA: three steps old, at every third
    step."""

    def __init__(self, device):
        self.forget()

    def forget(self):
        self.steps, self.seen = 0, None

    def read(self, alive):
        self.steps += 1
        if self.steps % 3:
            return None
        self.seen, seen = alive.clone(), self.seen
        return seen


@pytest.mark.parametrize("cache_tokens", [0, pytest.param(200, marks=pytest.mark.slow)])
def test_a_host_that_learns_late_of_ends_changes_nothing(
    gpt, random_prompts, cache_tokens, monkeypatch
):
    """Catches rows that go on after their end until the host hears of it (it looks every few steps
    on CUDA): tokens, lengths and ends are those of a host that sees everything, with and without
    rows that wait."""
    prompt, late = Sampler(gpt), Sampler(gpt, cache_tokens=cache_tokens)
    results = []
    for sampler, mirror in ((prompt, in_flight.AliveMirror), (late, Late)):
        monkeypatch.setattr(in_flight, "AliveMirror", mirror)
        first = sampler.generate(random_prompts, 6, [3 + i % 38 for i in range(42)], seed=2)
        results.append((first, sampler.extend(first, phrases_for(42), 2, 30, seed=2)))
    for on_time, behind in zip(*results):
        for name in ("tokens", "lengths", "ended"):
            assert getattr(on_time, name).tolist() == getattr(behind, name).tolist(), name
        assert worst_gap(gpt, behind) < 1e-4
    assert len(set(results[0][0].lengths.tolist())) > 20, (
        "rows must end at different times, or nothing is late"
    )


def test_the_first_look_at_ended_rows_begins_when_rows_have_moved(monkeypatch):
    """Catches a first copy that begins POLL_EVERY steps late, a copy of rows from before they
    moved, and one that is read before it is POLL_EVERY steps old."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kind: empty(*size, **kind))
    mirror = cuda_graphs.AliveMirror(torch.device("cpu"))
    mirror.event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    for _ in range(2):
        seen = [mirror.read(torch.arange(20) == step) for step in range(20)]
        every = cuda_graphs.POLL_EVERY
        assert [None if x is None else x.tolist().index(True) for x in seen] == [
            step - every if step and step % every == 0 else None for step in range(20)
        ]
        mirror.forget()


def test_an_outdated_cache_is_not_used(gpt, random_prompts):
    """Catches corrections sampled on keys of weights that are gone: after refresh() what is
    extended is what a fresh prompt gives."""
    sampler = Sampler(gpt)
    first = sampler.generate(random_prompts, 1, 20, seed=3)
    with torch.no_grad():
        gpt.blocks[0].qkv.weight.add_(torch.randn_like(gpt.blocks[0].qkv.weight))
    sampler.refresh()
    second = sampler.extend(first, phrases_for(len(first)), 1, 20, temperature=0)
    assert (
        second.tokens.tolist()
        == sampler.generate(second.prompts, 1, 20, temperature=0).tokens.tolist()
        and worst_gap(gpt, second) < 1e-4
    )


def test_filters_keep_the_tokens_they_should():
    """Catches the token that crosses top-p left out, a strict inequality, and filters on the wrong
    side of the temperature."""
    # probabilities .2 .4 .1 .3
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()[:, [2, 0, 3, 1]]
    kept = lambda **filters: torch.isfinite(filtered(logits, **filters))[0].tolist()
    assert kept(top_k=2) == [False, True, False, True] and kept(top_k=9) == [True] * 4
    assert (
        kept(top_p=0.75) == [True, True, False, True]
        and kept(top_p=0.3) == [False, True, False, False]
        and kept(top_p=1.0) == [True] * 4
    )
    assert kept(min_p=0.6) == [False, True, False, True] and kept(min_p=0.0) == [True] * 4
    assert kept(top_k=3, min_p=0.6) == [False, True, False, True]


def test_filters_act_in_both_layers(gpt, random_prompts):
    """Catches filters that reach no token: the likeliest alone is greedy whatever the temperature,
    in either layer."""
    sampler = Sampler(gpt)
    greedy, one = (
        sampler.generate(random_prompts, 1, 12, temperature=0),
        sampler.generate(random_prompts, 1, 12, temperature=2.0, top_k=1),
    )
    assert greedy.tokens.tolist() == one.tokens.tolist() and not one.logprobs.any()
    second, one = (
        sampler.extend(greedy, phrases_for(7), 1, 5, **how)
        for how in (dict(temperature=0), dict(temperature=2.0, top_p=1e-6))
    )
    assert second.tokens.tolist() == one.tokens.tolist() and not one.logprobs.any()


def test_graphs_need_kernels(gpt):
    """Catches a graph captured of a step whose shapes only the host knows."""
    with pytest.raises(ValueError, match="graph needs fused"):
        Sampler(gpt, fused=False, graph=True)


# ---- bad requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, new, match",
    [
        ([], 5, "no prompts"),
        ([[1], []], 5, "empty"),
        ([[1, VOCABULARY]], 5, "vocabulary"),
        ([[-1]], 5, "vocabulary"),
        ([[1] * 250], 10, "context"),
        ([[1]], 0, "context"),
    ],
)
def test_bad_prompts_are_named(gpt, prompts, new, match):
    """Catches an index error from deep inside torch where a sentence should stand."""
    with pytest.raises(ValueError, match=match):
        Sampler(gpt).generate(prompts, 1, new)


def test_bad_requests_are_named(gpt):
    """Catches rows out of order (their attention would be silently wrong), no rows, and a negative
    temperature."""
    sampler = Sampler(gpt)
    first = sampler.generate([[1], [2]], 1, 3)
    for rows in ([1, 0], [-1, 0], [1, 2]):
        with pytest.raises(ValueError, match="ascending"):
            sampler.extend(first, [[5], [5]], 1, 3, rows=rows)
    with pytest.raises(ValueError, match="no prompts"):
        sampler.extend(first, [], 1, 3, rows=[])
    with pytest.raises(ValueError, match="top_p 0 "):
        sampler.generate([[1]], 1, 3, top_p=0)
    for n, temperature in ((0, 1.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="cannot sample"):
            sampler.generate([[1]], n, 3, temperature)


def test_too_little_shared_memory_is_named(gpt, monkeypatch):
    """Catches torch's traceback in a container whose /dev/shm holds 64 MB, with a model that does
    not fit."""

    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: Success (0)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(OSError, match="enlarge /dev/shm"):
        in_parallel(Sampler(gpt), 2).generate([[1, 2]] * 40, 2, 3)
