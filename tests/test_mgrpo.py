"""The paper's mathematics against oracles: truth tables, brute force, exact enumeration, and TRL's
own numbers."""

import json
import math
import statistics

import pytest
import torch
from conftest import END, SHARED

from engine.packing import Leaf, batch_of
from mgrpo import (
    Sampling,
    choose_sources,
    collect,
    completion_logprobs,
    group_advantages,
    kl_estimate,
    layer2_advantages,
    loss_denominator,
    pad_rows,
    policy_loss,
    targets,
)
from model import GPT, ModelConfig
from tasks.problems import Problem

GOLDEN = SHARED / "golden" / "trl_loss.json"


# ---- advantages ----------------------------------------------------------------------------------


def test_group_advantages_against_brute_force():
    """Catches a wrong ddof, a mean over the batch instead of the group, or groups mixed up when
    siblings are not adjacent."""
    rewards = torch.tensor([1, 0, 0, 1, 0.5, 2, -1, 0.25, 3])
    groups = torch.tensor([0, 1, 0, 1, 0, 2, 2, 1, 2])
    found = group_advantages(rewards, groups)
    for g in range(3):
        mine = [r for r, k in zip(rewards.tolist(), groups.tolist()) if k == g]
        expected = [(r - statistics.mean(mine)) / (statistics.stdev(mine) + 1e-4) for r in mine]
        torch.testing.assert_close(found[groups == g], torch.tensor(expected))


def test_equal_rewards_give_exactly_zero():
    """Catches std == 0 tests on floats: the mean of equal rewards as computed is a little off for
    some of these, so their std is 1e-8, and noise would be scaled up to an advantage of 1e-4 or
    more."""
    off = 0
    for n in range(2, 40):
        for value in (0.1, 0.3, 0.7, 1 / 3, 1.1):
            rewards, groups = torch.full((n,), value), torch.zeros(n, dtype=torch.long)
            assert (group_advantages(rewards, groups) == 0).all()
            off += bool((rewards - torch.zeros(1).index_add_(0, groups, rewards) / n).any())
    assert off > 10, (
        "the naive mean must be off in some of these cases, or this test proves nothing"
    )


def test_a_single_sibling_has_advantage_zero():
    """Catches 0/0: a group of one has no spread to divide by."""
    assert group_advantages(torch.tensor([1.0, 5.0]), torch.tensor([0, 1])).tolist() == [0.0, 0.0]


def test_filter_after_normalising_leaves_a_gradient():
    """The trap of reading "failed corrections are discarded" literally: filtering first leaves
    equal rewards, so nothing to learn."""
    rewards, correct = (
        torch.tensor([1.0, 0, 0, 1, 1, 1]),
        torch.tensor([True, False, False, True, True, True]),
    )
    attempts = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages, trained = layer2_advantages(rewards, correct, attempts, "mask")
    p = 1 / 3
    assert advantages[0].item() == pytest.approx(
        math.sqrt((1 - p) / p) * math.sqrt(2 / 3), rel=1e-3
    )
    assert advantages[1:].tolist() == [0.0] * 5 and trained.tolist() == correct.tolist()
    literal = group_advantages(rewards[correct], attempts[correct])
    assert (literal == 0).all(), (
        "filtering before normalising must be shown to be degenerate, or this test proves nothing"
    )


def test_layer2_switches():
    """Catches a switch that changes nothing: each of keep, raw and question gives its own
    hand-computed numbers."""
    rewards, correct = torch.tensor([1.0, 0, 1, 1]), torch.tensor([True, False, True, True])
    attempts, questions = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0])
    keep, everyone = layer2_advantages(rewards, correct, attempts, "keep")
    r = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(keep, torch.tensor([r, -r, 0, 0]))
    assert everyone.all()
    assert layer2_advantages(rewards, correct, attempts, "raw")[0].tolist() == [1, 0, 1, 1]
    pooled, _ = layer2_advantages(rewards, correct, questions, "keep")
    torch.testing.assert_close(pooled, torch.tensor([0.25, -0.75, 0.25, 0.25]) / (0.5 + 1e-4))


def test_sources():
    """Catches a rule that sends the wrong attempts on, or several of a kind under `balanced`."""
    correct, questions = torch.tensor([0, 1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 1, 1])
    assert choose_sources(correct, questions, "all").tolist() == [0, 1, 2, 3, 4, 5]
    assert choose_sources(correct, questions, "wrong").tolist() == [0, 3, 4, 5]
    assert choose_sources(correct, questions, "balanced").tolist() == [0, 1, 3]


# ---- loss ----------------------------------------------------------------------------------------

EPS = 0.2
TRUTH = [  # advantage, ratio -> loss of a single token, d loss / d logp
    # above the clip: no more push up
    (+1.0, 0.5, -0.5, -0.5),
    (+1.0, 1.0, -1.0, -1.0),
    (+1.0, 1.5, -1.2, 0.0),
    # below the clip: no more push down
    (-1.0, 0.5, +0.8, 0.0),
    (-1.0, 1.0, +1.0, +1.0),
    (-1.0, 1.5, +1.5, +1.5),
    (+1.0, 0.81, -0.81, -0.81),
    (+1.0, 1.19, -1.19, -1.19),
    (-1.0, 0.81, 0.81, 0.81),
    (-1.0, 1.19, 1.19, 1.19),
]


@pytest.mark.parametrize("advantage, ratio, value, gradient", TRUTH)
def test_policy_loss_truth_table(advantage, ratio, value, gradient):
    """Catches a clip on the wrong side, a max for a min, and a sign: the ten cases of advantage x
    ratio."""
    logp = torch.tensor([[math.log(ratio) - 1.5]], requires_grad=True)
    loss, found = policy_loss(
        logp, torch.tensor([[-1.5]]), torch.tensor([advantage]), torch.ones(1, 1).bool()
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert found["clipped"].item() == (gradient == 0.0)


def test_loss_is_zero_on_policy_but_its_gradient_is_not():
    """The question every newcomer asks. At ratio 1 the loss is -mean(advantages) = 0 by
    construction; its gradient moves the policy."""
    logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 1).bool())
    loss.backward()
    assert loss.item() == 0.0 and logp.grad.flatten().tolist() == [-0.5, 0.5]


def test_normalisations_by_hand():
    """Catches a missing 1/|o_i|, a mean over rows for a mean over tokens, or pads counted: rows of
    1 and 3 tokens, ratio 1."""
    logp, mask = torch.zeros(2, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    advantages = torch.tensor([2.0, -1.0])
    losses = {
        n: policy_loss(logp, logp, advantages, mask, normalize=n)[0].item()
        for n in ("sequence", "token", "constant")
    }
    assert losses["sequence"] == pytest.approx(-(2 - 1) / 2)
    assert losses["token"] == pytest.approx(-(2 - 3) / 4)
    assert losses["constant"] == pytest.approx(-(2 - 3) / (2 * 4))


def test_what_stands_outside_of_the_mask_cannot_matter():
    """Catches prompt tokens or pads in the loss: garbage there, a log-ratio of 1,000 say, changes
    neither value nor gradient."""
    mask = torch.tensor([[True, True, False]])
    results = []
    for garbage in (0.0, 500.0):
        logp = torch.tensor([[-1.0, -2.0, garbage]], requires_grad=True)
        loss, _ = policy_loss(
            logp, torch.tensor([[-1.1, -1.9, -garbage]]), torch.tensor([1.0]), mask
        )
        loss.backward()
        results.append((loss.item(), logp.grad.tolist()))
    assert results[0] == results[1] and results[0][1][0][2] == 0


def test_kl_estimators_exactly():
    """The docstring of kl_estimate, all of it, by enumerating a 5-token softmax: expected values
    and expected gradients.

    E over tokens x ~ π of the estimate and of its gradient (the sample held fixed, as in a loss
    term).
    """
    torch.manual_seed(3)
    theta, reference = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64).log_softmax(0),
    )
    logp = theta.log_softmax(0)
    p = logp.exp().detach()
    forward = (reference.exp() * (reference - logp)).sum()  # KL(π_ref || π)
    reverse = (logp.exp() * (logp - reference)).sum()  # KL(π || π_ref)
    d_forward, d_reverse = (
        torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (forward, reverse)
    )
    expected, gradient = {}, {}
    for kl in ("k1", "k2", "k3"):
        mean = (p * kl_estimate(logp, reference, kl)).sum()
        expected[kl], gradient[kl] = (
            mean.item(),
            torch.autograd.grad(mean, theta, retain_graph=True)[0],
        )
    assert expected["k1"] == pytest.approx(reverse.item()) and expected["k3"] == pytest.approx(
        reverse.item()
    )
    assert abs(expected["k2"] - reverse.item()) > 0.01
    torch.testing.assert_close(
        gradient["k1"], torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(gradient["k2"], d_reverse)
    torch.testing.assert_close(gradient["k3"], d_forward)
    assert (gradient["k3"] - d_reverse).abs().max() > 0.01


@pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"needs {GOLDEN.name}, which is not part of this repository"
)
def test_losses_and_gradients_equal_trl():
    """Catches any drift from the field's reference implementation: values and gradients of TRL's
    own loss code, in float64."""
    golden = json.loads(GOLDEN.read_text())
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in golden["inputs"].items()}
    names, checked = dict(grpo="sequence", bnpo="token", dapo="token", dr_grpo="constant"), 0
    for case in golden["loss_cases"]:
        if (
            case["loss_type"] not in names
            or case["level"] != "token"
            or case["delta"]
            or case["bias_kl"]
        ):
            continue  # GSPO's sequence ratios, dual clip, CISPO: not what this project implements
        logp, mask = inputs["policy"].clone().requires_grad_(), inputs[case["mask"]].bool()
        old = inputs["old"] if case["old"] else logp.detach()
        normalize, k = names[case["loss_type"]], case["accum"]
        whole = loss_denominator(mask.sum(1), normalize, golden["max_completion_length"])
        if case["loss_type"] == "dapo":
            whole = case.get("num_items_in_batch", int(mask.sum()))
        parts = [slice(i * len(logp) // k, (i + 1) * len(logp) // k) for i in range(k)]
        loss = 0
        # TRL means over equal micro-batches for bnpo; the others have a denominator of the whole
        # step
        for part in parts:
            denominator = k * int(mask[part].sum()) if case["loss_type"] == "bnpo" else whole
            loss = (
                loss
                + policy_loss(
                    logp[part],
                    old[part],
                    inputs["advantages"][part],
                    mask[part],
                    clip_low=case["epsilon"],
                    clip_high=case["epsilon_high"] or case["epsilon"],
                    ref_logp=inputs["ref"][part],
                    kl_coef=case["beta"],
                    normalize=normalize,
                    denominator=denominator,
                )[0]
            )
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6), case
        torch.testing.assert_close(
            logp.grad, torch.tensor(case["grad_policy"], dtype=torch.float64), atol=1e-7, rtol=1e-5
        )
        checked += 1
    assert checked >= 50


@pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"needs {GOLDEN.name}, which is not part of this repository"
)
def test_advantages_equal_trl():
    """Catches a population std for a sample std, and another eps."""
    golden = json.loads(GOLDEN.read_text())
    groups, checked = torch.arange(12) // golden["num_generations"], 0
    for case in golden["advantage_cases"]:
        if (
            case["scale_rewards"] in ("group", "none")
            and len(case["rewards"]) == 1
            and not case["none_at"]
        ):
            rewards = torch.tensor(golden["inputs"][case["rewards"][0]])
            found = group_advantages(rewards, groups, std=case["scale_rewards"] == "group")
            torch.testing.assert_close(
                found, torch.tensor(case["advantages"]), atol=1e-4, rtol=1e-4
            )
            checked += 1
    assert checked >= 2


# ---- rows and their log-probs --------------------------------------------------------------------


def test_transcript_mask_covers_exactly_the_sampled_tokens(gpt):
    """Catches the off-by-one of every GRPO script, and loss on the copied attempt or the phrase.

    Layer 2 by hand: question 5 6, attempt 7 8, phrase 9, correction 10 11 end. Only the last three
    may carry a gradient.
    """
    end = END
    rows = pad_rows([[5, 6, 7, 8, 9], [5]], [[10, 11, end], [12, end]], "cpu")
    assert rows.mask.tolist() == [[True, True, True], [True, True, False]]
    logp, entropy = completion_logprobs(gpt, rows)
    full = gpt(torch.tensor([[5, 6, 7, 8, 9, 10, 11, end]]))
    expected = (full @ gpt.head.weight.T).log_softmax(-1)[0]
    torch.testing.assert_close(
        logp[0], torch.stack([expected[4, 10], expected[5, 11], expected[6, end]])
    )
    torch.testing.assert_close(entropy[0, 0], -(expected[4].exp() * expected[4]).sum())
    assert logp[1, 2] == 0 and entropy[1, 2] == 0


def test_the_end_token_is_trained(gpt):
    """Catches a mask that stops before the end token: the model would never learn to stop. Its
    logit must get gradient."""
    rows = pad_rows([[5, 6]], [[10, END]], "cpu")
    logp, _ = completion_logprobs(gpt, rows)
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([1.0]), rows.mask)
    loss.backward()
    with_end = gpt.embed.weight.grad.clone()
    gpt.zero_grad()
    short = pad_rows([[5, 6]], [[10]], "cpu")
    logp, _ = completion_logprobs(gpt, short)
    policy_loss(logp, logp.detach(), torch.tensor([1.0]), short.mask)[0].backward()
    assert (with_end[END] - gpt.embed.weight.grad[END]).abs().max() > 1e-3


class Scripted:
    """A sampler that answers from a script, in the shape of sample.Sampler: what a hand-written
    transcript needs."""

    def __init__(self, encoding, attempts, corrections):
        self.encoding, self.scripts, self.asked = encoding, {1: attempts, 2: corrections}, []

    def _completions(self, prompts, n, depth, parents):
        from sample import Completions

        rows = [
            self.encoding.encode_ordinary(t) + [self.encoding.eot_token]
            for t in self.scripts[depth]
        ]
        assert len(rows) == len(prompts) * n, "G or H was counted twice, or not at all"
        width = max(map(len, rows))
        lengths = torch.tensor([len(r) for r in rows])
        return Completions(
            prompts,
            n,
            depth,
            torch.tensor([r + [0] * (width - len(r)) for r in rows]),
            torch.zeros(len(rows), width),
            lengths,
            torch.ones(len(rows)).bool(),
            parents,
            torch.arange(len(rows)),
        )

    def generate(self, prompts, n, max_new_tokens, temperature, seed, first_row):
        return self._completions(prompts, n, 1, torch.arange(len(prompts)).repeat_interleave(n))

    def extend(self, c, phrases, n, max_new_tokens, temperature, seed, rows):
        self.asked = [self.encoding.decode(p) for p in phrases]
        prompts = [c.prompts[i // c.n] + c.ids[i] + p for i, p in zip(rows.tolist(), phrases)]
        return self._completions(prompts, n, 2, rows.repeat_interleave(n))


def scripted_rollout(encoding, **switches):
    """Two questions, G = 2, H = 2; answers are right or wrong as written -> layers, the sampler."""
    answer = "<think></think><answer>{}</answer>".format
    # question 0: right, wrong; 1: wrong, right
    sampler = Scripted(
        encoding, [answer(a) for a in (1, 0, 0, 2)], [answer(a) for a in (1, 0, 1, 0, 2, 2, 2, 0)]
    )
    problems = [Problem("a", "1", None), Problem("b", "2", None)]
    return collect(sampler, encoding, problems, 2, 2, Sampling(9, 1.0, 0), **switches), sampler


def test_collect_on_a_hand_written_tree(encoding):
    """Catches rewards credited to the wrong parent, G multiplied into layer 2 twice, or an altered
    prompt."""
    (first, second), sampler = scripted_rollout(encoding)
    assert first.correct.tolist() == [True, False, False, True] and first.questions.tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert second.parents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and second.questions.tolist() == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    assert second.correct.tolist() == [True, False, True, False, True, True, True, False]
    r = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(first.advantages, torch.tensor([r, -r, -r, r]))
    torch.testing.assert_close(second.advantages, torch.tensor([r, 0, r, 0, 0, 0, r, 0]))
    assert second.trained.tolist() == second.correct.tolist()
    prompt = encoding.decode(second.completions.prompts[1])
    assert prompt == "a\n" + first.texts[1] + sampler.asked[1] and sampler.asked[1].startswith("\n")


def padded(layer, rows):
    """Rows of a layer as train.py pads them."""
    return batch_of([Leaf(layer, row, ()) for row in rows], "rows", "cpu")


def test_only_sampled_tokens_of_layer_2_carry_loss(encoding, gpt):
    """The transcript through the real path, pack and all: the loss must answer to each correction's
    tokens, and only to them.

    d loss / d embedding of a PROMPT token is not 0 (it is context), so the test moves the targets:
    replacing any token of the copied attempt or the phrase as a TARGET is impossible, since
    log-probabilities come out for exactly the sampled positions.
    """
    (_, second), _ = scripted_rollout(encoding)
    rows, (old, advantages, mask) = padded(second, range(8)), targets(second, torch.arange(8))
    logp, _ = completion_logprobs(gpt, rows)
    assert torch.equal(mask, rows.mask)
    assert logp.shape == old.shape and rows.mask.sum(1).tolist() == second.lengths.tolist()
    for i in range(8):
        prompt, sampled = (
            second.completions.prompts[i // 2],
            second.completions.tokens[i, : second.lengths[i]].tolist(),
        )
        assert (
            rows.tokens[i, : len(prompt) + len(sampled)].tolist() == prompt + sampled
            and sampled[-1] == END
        )
        full = (gpt(torch.tensor([prompt + sampled]))[0] @ gpt.head.weight.T).log_softmax(-1)
        expected = [full[len(prompt) - 1 + t, token].item() for t, token in enumerate(sampled)]
        assert logp[i, : len(sampled)].tolist() == pytest.approx(expected, abs=1e-4)
    (grad,) = torch.autograd.grad(policy_loss(logp, old, advantages, rows.mask)[0], logp)
    assert ((grad != 0) == (rows.mask & (advantages != 0)[:, None])).all()


def test_layer_1_alone_is_grpo(encoding):
    """Catches a `--layers 1` that still samples, or trains on, a second layer."""
    layers, sampler = scripted_rollout(encoding, layers=1)
    assert len(layers) == 1 and sampler.asked == []


def test_targets_keep_the_samplers_numbers(encoding):
    """Catches rows and their old log-probabilities or advantages getting out of step when rows are
    reordered."""
    (_, second), _ = scripted_rollout(encoding)
    second.completions.logprobs = (
        torch.arange(8.0)[:, None].expand(8, second.completions.tokens.shape[1]).clone()
    )
    rows, (old, advantages, _) = padded(second, [6, 0, 2]), targets(second, torch.tensor([6, 0, 2]))
    assert (
        old[:, 0].tolist() == [6, 0, 2]
        and advantages.tolist() == second.advantages[[6, 0, 2]].tolist()
    )
    given = rows.tokens[0, : rows.prompt_lengths[0]].tolist()
    assert given == second.completions.prompts[3]


def test_a_verifier_that_fails_is_counted(encoding):
    """Catches failures of a verifier that look like wrong answers: they are marked, in both layers,
    and score 0."""

    class Breaks:
        def same(self, answer, gold):
            if answer == "1":
                raise RuntimeError("out of cheese")
            return True

    sampler = Scripted(
        encoding,
        ["<answer>1</answer>", "<answer>2</answer>"],
        ["<answer>2</answer>", "<answer>1</answer>"],
    )
    first, second = collect(
        sampler,
        encoding,
        [Problem("a", "7", None)],
        2,
        1,
        Sampling(9, 1.0, 0, verifier=Breaks()),
        failed="raw",
    )
    assert first.undecided.tolist() == [True, False] == first.rewards.eq(
        0
    ).tolist() and second.undecided.tolist() == [False, True]


def test_padding_may_reach_beyond_the_context():
    """Catches a row that just fits the context refused, since S is rounded up: 125 tokens in a
    context of 124 + 1 are padded to 128."""
    torch.manual_seed(0)
    tight, wide = (GPT(ModelConfig(50, 32, 1, 2, 1, 16, 32, context)) for context in (124, 400))
    tight.load_state_dict(wide.state_dict())
    rows = pad_rows([[1] * 100], [[2] * 25], "cpu")
    assert rows.tokens.shape[1] == 128
    for ours, theirs in zip(completion_logprobs(tight, rows), completion_logprobs(wide, rows)):
        torch.testing.assert_close(ours, theirs)
