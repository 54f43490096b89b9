"""mgrpo.py against oracles: truth tables, brute force, exact enumeration, hand-written trees, and
TRL's own numbers."""

import inspect
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import END, SHARED

from engine.packing import pad_rows, padded_logprobs
from mgrpo import (
    MGRPO,
    PHRASES,
    SamplingParams,
    choose_sources,
    credit,
    draw_phrases,
    group_advantages,
    kl_estimate,
    longest_phrase,
    loss_denominator,
    phrase_text,
    policy_loss,
    rollout,
)
from sample import Completions, Sampler
from tasks.problems import Problem
from variants.table import with_constants

GOLDEN = SHARED / "golden" / "trl_loss.json"
needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"needs {GOLDEN.name}, which is not part of this repository"
)


# ---- a rollout by hand ---------------------------------------------------------------------------


@dataclass
class FixedTask:
    """A Task whose problems are given."""

    encoding: Any
    problems: list
    verifier: Any = None
    max_new_tokens: int = 12
    prompt_tokens: int = 8
    name = "fixed"
    unit = "questions"

    def prompt_ids(self, problem):
        return self.encoding.encode_ordinary(problem.question + "\n")

    def train_problems(self, seed, step, count):
        return self.problems[:count]

    def held_out(self, count=0, seed=0):
        return self.problems[:count] if count else self.problems


class ScriptedSampler:
    """Answers from a script, with the interface of sample.Sampler.

    write(layer, number): the text of row `number` of a layer. A text that lacks its "</answer>" is
    truncated. policy: a GPT whose log-probabilities the rows get; without one these are 0.
    """

    seen = None

    def __init__(self, encoding, write, policy=None):
        self.encoding, self.write, self.policy = encoding, write, policy
        self.first_rows, self.phrases = [], []  # of each generate, of each extend

    def refresh(self, weights=None):
        pass

    def generate(self, prompts, n, max_new_tokens, temperature, seed, first_row):
        self.layer = 1
        self.first_rows.append(first_row)
        rows = torch.arange(len(prompts) * n)
        return self.completions(prompts, n, temperature, rows // n, first_row + rows)

    def extend(self, above, phrases, n, max_new_tokens, temperature, seed, rows):
        self.layer += 1
        self.phrases.append([self.encoding.decode(phrase) for phrase in phrases])
        prompts = [
            above.prompts[row // above.n] + above.ids[row] + phrase
            for row, phrase in zip(rows.tolist(), phrases, strict=True)
        ]
        parents = rows.repeat_interleave(n)
        numbers = above.numbers[parents] * n + torch.arange(n).repeat(len(rows))
        return self.completions(prompts, n, temperature, parents, numbers)

    def completions(self, prompts, n, temperature, parents, numbers):
        texts = [self.write(self.layer, number) for number in numbers.tolist()]
        ended = [text.endswith("</answer>") for text in texts]
        rows = [
            self.encoding.encode_ordinary(text) + [END] * end for text, end in zip(texts, ended)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
        logprobs = torch.zeros(tokens.shape)
        if self.policy:
            above = [prompt for prompt in prompts for _ in range(n)]
            with torch.no_grad():
                batch = pad_rows(above, rows, "cpu")
                logprobs, _ = padded_logprobs(self.policy, batch, temperature)
        ended = torch.tensor(ended)
        return Completions(
            prompts, n, self.layer, tokens, logprobs, lengths, ended, parents, numbers
        )


def answer(value):
    return f"<think></think><answer>{value}</answer>"


# Two questions with golds 1 and 2, of three layers with groups of 2: what row i of a layer answers.
ANSWERS = {
    1: (1, 0, 0, 2),
    2: (1, 0, 1, 0, 2, 2, 2, 0),
    3: (1, 1, 1, 0, 0, 1, 0, 0, 2, 0, 0, 0, 2, 2, 2, 2),
}


def scripted_rollout(encoding, group_sizes=(2, 2), policy=None, **options):
    """The rollout of ANSWERS, at most three layers -> layers, sampler, task. options: constants of
    --method-args."""
    sampler = ScriptedSampler(encoding, lambda k, row: answer(ANSWERS[k][row]), policy)
    task = FixedTask(encoding, [Problem("a", "1", None), Problem("b", "2", None)])
    sources = options.pop("sources", "all")
    sampling = SamplingParams(12, 1.0, 0)
    layers = rollout(sampler, task, task.problems, group_sizes, sampling, sources)
    credit(layers, with_constants(MGRPO, dict(siblings="parent") | options))
    return layers, sampler, task


# ---- advantages ----------------------------------------------------------------------------------


def test_group_advantages_against_brute_force():
    """Catches a wrong ddof, a mean over the batch instead of the group, and groups mixed up when
    siblings are not adjacent."""
    rewards = torch.tensor([1, 0, 0, 1, 0.5, 2, -1, 0.25, 3])
    groups = torch.tensor([0, 1, 0, 1, 0, 2, 2, 1, 2])
    found = group_advantages(rewards, groups)
    for g in range(3):
        group = [r for r, k in zip(rewards.tolist(), groups.tolist()) if k == g]
        mean, std = statistics.mean(group), statistics.stdev(group)
        expected = torch.tensor([(r - mean) / (std + 1e-4) for r in group])
        torch.testing.assert_close(found[groups == g], expected)


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


def corrections(rewards, siblings, failed):
    """Advantages and trained rows of a second layer with these rewards and siblings."""
    layer = SimpleNamespace(
        number=2,
        rewards=rewards,
        correct=rewards == 1,
        questions=siblings,
        parents=siblings,
        observed={},
    )
    credit([layer], with_constants(MGRPO, dict(failed=failed)))
    return layer.advantages, layer.trained


def test_failed_corrections_are_discarded_after_normalising():
    """Catches a filter before the normalisation: what is left of a group has equal rewards, so the
    advantages are all 0."""
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    correct = rewards == 1
    siblings = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages, trained = corrections(rewards, siblings, "mask")
    p = 1 / 3
    expected = math.sqrt((1 - p) / p) * math.sqrt(2 / 3)
    assert advantages[0].item() == pytest.approx(expected, rel=1e-3)
    assert advantages[1:].tolist() == [0.0] * 5 and trained.tolist() == correct.tolist()
    literal = group_advantages(rewards[correct], siblings[correct])
    assert (literal == 0).all(), "the other order must give zeros, or this test proves nothing"


R = 0.5 / (math.sqrt(0.5) + 1e-4)  # the advantage in a group of one right and one wrong answer


@pytest.mark.parametrize(
    "failed, siblings, advantages, trained",
    [
        ("mask", [0, 0, 1, 1], [R, 0, 0, 0], [1, 0, 1, 1]),
        ("keep", [0, 0, 1, 1], [R, -R, 0, 0], [1, 1, 1, 1]),
        ("raw", [0, 0, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1]),
        ("keep", [0, 0, 0, 0], [0.49990, -1.49970, 0.49990, 0.49990], [1, 1, 1, 1]),
    ],
)
def test_advantages_of_corrections_truth_table(failed, siblings, advantages, trained):
    """Catches a switch that changes nothing: each row was computed by hand for rewards 1 0 1 1."""
    rewards = torch.tensor([1.0, 0, 1, 1])
    found = corrections(rewards, torch.tensor(siblings), failed)
    torch.testing.assert_close(
        found[0], torch.tensor(advantages, dtype=torch.float32), atol=1e-4, rtol=0
    )
    assert found[1].int().tolist() == trained


def test_sources_by_rule():
    """Catches a rule that continues the wrong answers' siblings, or in another order."""
    correct = torch.tensor([0, 1, 1, 0, 0, 0]).bool()
    layer = SimpleNamespace(correct=correct)
    assert choose_sources(layer, "all").tolist() == [0, 1, 2, 3, 4, 5]
    assert choose_sources(layer, "wrong").tolist() == [0, 3, 4, 5]


# ---- loss ----------------------------------------------------------------------------------------

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


def test_clip_higher_moves_the_upper_bound_alone():
    """Catches --clip 0.2,0.28 taken for one number: a ratio of 1.25 has a gradient under the wider
    bound, one of 0.75 has none under either."""
    for ratio, advantage, gradients in ((1.25, 1.0, (0.0, -1.25)), (0.75, -1.0, (0.0, 0.0))):
        for clip_high, gradient in zip((0.2, 0.28), gradients):
            logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
            one = torch.ones(1, 1).bool()
            loss, _ = policy_loss(
                logp, torch.zeros(1, 1), torch.tensor([advantage]), one, clip_high=clip_high
            )
            loss.backward()
            assert logp.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_policy_loss_is_called_as_documented():
    """Catches a renamed argument and another default: users call this function by these names."""
    names = inspect.signature(policy_loss)
    assert str(names) == (
        "(logp, old_logp, advantages, mask, *, clip_low=0.2, clip_high=0.2, ref_logp=None, "
        "kl_coef=0.0, kl='k3', normalize='sequence', denominator=None, surrogate='clipped', "
        "token_weights=None)"
    )


def test_loss_is_zero_on_policy_but_its_gradient_is_not():
    """At ratio 1 the loss is -mean(advantages) = 0 by construction. Its gradient is not 0."""
    logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 1).bool())
    loss.backward()
    assert loss.item() == 0.0 and logp.grad.flatten().tolist() == [-0.5, 0.5]


def test_normalisations_by_hand():
    """Catches a missing 1/|o_i|, a mean over rows for a mean over tokens, and padding counted: rows
    of 1 and 3 tokens, ratio 1."""
    logp, mask = torch.zeros(2, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    advantages = torch.tensor([2.0, -1.0])
    losses = {
        n: policy_loss(logp, logp, advantages, mask, normalize=n)[0].item()
        for n in ("sequence", "token", "constant")
    }
    assert losses["sequence"] == pytest.approx(-(2 - 1) / 2)
    assert losses["token"] == pytest.approx(-(2 - 3) / 4)
    assert losses["constant"] == pytest.approx(-(2 - 3) / (2 * 4))


def test_denominators_by_hand():
    """Catches a count of the batch's widest row where the run's limit is meant, and the reverse."""
    lengths = torch.tensor([1, 3, 5])
    found = [loss_denominator(lengths, n, 10) for n in ("sequence", "token", "constant")]
    assert found == [3, 9, 30]


def test_what_is_outside_of_the_mask_cannot_matter():
    """Catches prompt tokens or padding in the loss: garbage there, a log-ratio of 1,000, changes
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
    and expected gradients over tokens drawn from π, each sample held fixed as in a loss term."""
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


@needs_golden
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


@needs_golden
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


# ---- phrases -------------------------------------------------------------------------------------


def test_a_phrase_depends_on_seed_layer_and_row_alone():
    """Catches a phrase drawn from a stream, which would change with the batch around it; one phrase
    for all rows; and the same phrases in every layer."""
    rows = list(range(300))
    drawn = draw_phrases(5, 2, rows)
    assert draw_phrases(5, 2, rows[100:200]) == drawn[100:200]
    assert [draw_phrases(5, 2, [row])[0] for row in (0, 7, 299)] == [drawn[i] for i in (0, 7, 299)]
    counts = Counter(drawn)
    # 43 of each on average, standard deviation 6
    assert set(counts) == set(PHRASES) and 15 < min(counts.values()) <= max(counts.values()) < 80
    for other in (draw_phrases(6, 2, rows), draw_phrases(5, 3, rows)):
        assert sum(a == b for a, b in zip(drawn, other)) < 90


def test_the_longest_phrase_is_measured_as_it_is_appended(encoding):
    """Catches the line break before a phrase left out of the plan for context and memory."""
    lengths = [len(encoding.encode_ordinary("\n" + phrase)) for phrase in PHRASES]
    assert longest_phrase(encoding) == max(lengths) == 2
    assert phrase_text("Wait.") == "\nWait."


# ---- rollout -------------------------------------------------------------------------------------


def test_rollout_of_a_hand_written_tree(encoding):
    """Catches rewards credited to the wrong parent, group sizes multiplied twice, and an altered
    prompt."""
    (first, second), sampler, _ = scripted_rollout(encoding)
    assert first.correct.tolist() == [True, False, False, True]
    assert first.questions.tolist() == first.parents.tolist() == [0, 0, 1, 1]
    assert second.parents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert second.questions.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert second.correct.tolist() == [True, False, True, False, True, True, True, False]
    assert second.rewards.tolist() == [1, 0, 1, 0, 1, 1, 1, 0]
    torch.testing.assert_close(first.advantages, torch.tensor([R, -R, -R, R]))
    torch.testing.assert_close(second.advantages, torch.tensor([R, 0, R, 0, 0, 0, R, 0]))
    assert first.trained.all() and second.trained.tolist() == second.correct.tolist()
    prompt = encoding.decode(second.completions.prompts[1])
    assert prompt == "a\n" + first.texts[1] + sampler.phrases[0][1]
    assert [phrase_text(phrase) for phrase in second.phrases[::2]] == sampler.phrases[0]
    assert second.phrases[::2] == second.phrases[1::2] and first.phrases is None


def test_a_third_layer_is_compared_with_its_own_siblings(encoding):
    """Catches siblings taken from the layer above, and advantages of layer 3 that follow the rule
    of layer 1: by hand, for each rule."""
    (_, second, third), sampler, _ = scripted_rollout(encoding, (2, 2, 2))
    assert [layer.number for layer in (second, third)] == [2, 3] and len(sampler.phrases) == 2
    assert third.parents.tolist() == [row for row in range(8) for _ in range(2)]
    assert third.questions.tolist() == [0] * 8 + [1] * 8
    right = [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1]
    assert third.correct.int().tolist() == right
    advantages = [0, 0, R, 0, 0, R, 0, 0, R, 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(third.advantages, torch.tensor(advantages))
    kept = scripted_rollout(encoding, (2, 2, 2), failed="keep")[0][2]
    advantages = [0, 0, R, -R, -R, R, 0, 0, R, -R, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(kept.advantages, torch.tensor(advantages))


@pytest.mark.parametrize("failed", ["mask", "keep"])
def test_siblings_by_question_pool_all_corrections_of_a_question(encoding, failed):
    """Catches siblings=question that compares within one parent only, or reaches layer 1."""
    layers, _, _ = scripted_rollout(encoding, (2, 2, 2), siblings="question", failed=failed)
    torch.testing.assert_close(layers[0].advantages, torch.tensor([R, -R, -R, R]))
    for layer in layers[1:]:
        expected = group_advantages(layer.rewards, layer.questions)
        if failed == "mask":
            expected[~layer.correct] = 0
        assert layer.advantages.tolist() == expected.tolist()
        assert layer.siblings.tolist() == layer.questions.tolist()


def test_only_wrong_answers_go_on_if_asked(encoding):
    """Catches sources counted from the wrong end: parents, questions and phrases of the rows that
    go on must stay in step."""
    (first, second, third), sampler, _ = scripted_rollout(encoding, (2, 2, 2), sources="wrong")
    assert first.correct.tolist() == [True, False, False, True]
    assert second.parents.tolist() == [1, 1, 2, 2] and second.questions.tolist() == [0, 0, 1, 1]
    # rows 2 3 4 5 of the script, of which row 3 is wrong
    assert second.completions.numbers.tolist() == [2, 3, 4, 5]
    assert third.parents.tolist() == [1, 1] and third.completions.numbers.tolist() == [6, 7]
    phrases = draw_phrases(0, 2, [1, 2]), draw_phrases(0, 3, [3])
    assert [second.phrases[::2], third.phrases[::2]] == list(phrases)
    assert len(sampler.phrases[0]) == 2 and len(sampler.phrases[1]) == 1


def test_no_layer_below_when_no_answer_is_selected(encoding):
    """Catches a crash, and an empty layer, when every answer is right and only wrong ones go on."""
    sampler = ScriptedSampler(encoding, lambda layer, row: answer(1))
    task = FixedTask(encoding, [Problem("a", "1", None)] * 2)
    layers = rollout(sampler, task, task.problems, (2, 2, 2), SamplingParams(9, 1.0, 0), "wrong")
    assert len(layers) == 1 and sampler.phrases == []


def test_one_group_size_is_grpo(encoding):
    """Catches --group-sizes 4 that still samples, or trains on, a second layer."""
    sampler = ScriptedSampler(encoding, lambda layer, row: answer(row % 2))
    task = FixedTask(encoding, [Problem("a", "1", None)])
    (layer,) = rollout(sampler, task, task.problems, (4,), SamplingParams(9, 1.0, 0))
    assert layer.correct.tolist() == [False, True, False, True] and sampler.phrases == []


def test_verifier_failures_are_counted(encoding):
    """Catches failures of a verifier that look like wrong answers: they are marked in every layer,
    and score 0."""

    class Breaks:
        def same(self, answer, gold):
            if answer == "1":
                raise RuntimeError("out of cheese")
            return True

    # layer 1: fails, right; layer 2: right, fails; layer 3: fails, right
    sampler = ScriptedSampler(encoding, lambda layer, row: answer(1 + (layer + row + 1) % 2))
    task = FixedTask(encoding, [Problem("a", "7", None)], Breaks())
    layers = rollout(sampler, task, task.problems, (2, 1, 1), SamplingParams(9, 1.0, 0))
    for layer, failed in zip(layers, ([True, False], [False, True], [True, False])):
        assert layer.undecided.tolist() == failed == layer.rewards.eq(0).tolist()
        assert layer.correct.tolist() == [not x for x in failed]


def test_good_form_is_paid_as_asked(encoding):
    """Catches a format weight that is lost on its way to a layer, or that makes an answer right."""
    sampler = ScriptedSampler(encoding, lambda layer, row: answer(0))
    task = FixedTask(encoding, [Problem("a", "1", None)])
    layers = rollout(
        sampler, task, task.problems, (2, 1, 1), SamplingParams(9, 1.0, 0), format_weight=0.25
    )
    for layer in layers:
        assert layer.rewards.tolist() == [0.25, 0.25] and not layer.correct.any()


# ---- rollouts of a model, of one, two and three layers -------------------------------------------

SHAPES = [(16,), (4, 3), (3, 2, 2)]
SAMPLING = SamplingParams(12, 1.0, seed=5)


@pytest.fixture
def task(encoding):
    """Three questions of different lengths; nothing that a random model writes is right."""
    problems = [
        Problem(question, "1", None) for question in ("x = 3", "7", "x in {3, 8}, x*4 = 10")
    ]
    return FixedTask(encoding, problems)


@pytest.fixture
def policy(gpt):
    """conftest's model, but it ends about a third of its rows before 12 tokens."""
    with torch.no_grad():
        gpt.embed.weight[END] *= 3
    return gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_rollout_is_a_tree(policy, task, shape):
    """Catches every way to lose the tree: rows, parents, questions, phrases and prompts of each
    layer. A prompt only grows: that of layer k is that of layer k - 1, its answer without the end
    token, a line break and the phrase."""
    layers = rollout(Sampler(policy), task, task.problems, shape, SAMPLING)
    assert [layer.number for layer in layers] == list(range(1, len(shape) + 1))
    encode, above = task.encoding.encode_ordinary, None
    for n, layer in zip(shape, layers):
        c = layer.completions
        rows = len(above.texts) if above else len(task.problems)
        assert c.n == n and len(c) == len(layer.texts) == rows * n
        assert layer.parents.tolist() == [row for row in range(rows) for _ in range(n)]
        if above is None:
            assert c.prompts == [task.prompt_ids(problem) for problem in task.problems]
            assert layer.questions.tolist() == layer.parents.tolist() and layer.phrases is None
        else:
            assert layer.questions.tolist() == above.questions[layer.parents].tolist()
            drawn = draw_phrases(SAMPLING.seed, layer.number, range(rows))
            assert layer.phrases == [phrase for phrase in drawn for _ in range(n)]
            for row, prompt in enumerate(c.prompts):
                up = above.completions
                answered = up.sampled[row]
                if up.ended[row]:
                    assert answered[-1] == END
                    answered = answered[:-1]
                assert END not in answered
                assert prompt == up.prompts[row // up.n] + answered + encode("\n" + drawn[row])
        above = layer
    ended = torch.cat([layer.completions.ended for layer in layers])
    assert ended.any() and not ended.all(), "rows must both end and be truncated"


@pytest.mark.parametrize("shape", SHAPES)
def test_sampler_and_trainer_agree_in_every_layer(policy, task, shape):
    """Catches two engines that drift apart: the sampler's log-probabilities are those of the
    trainer's padded rows, within 1e-4 in fp32, at the sampling temperature."""
    sampling = SAMPLING._replace(temperature=0.8)
    for layer in rollout(Sampler(policy), task, task.problems, shape, sampling):
        c = layer.completions
        batch = pad_rows([c.prompts[row // c.n] for row in range(len(c))], c.sampled, "cpu")
        logp, _ = padded_logprobs(policy, batch, 0.8)
        untempered, _ = padded_logprobs(policy, batch)
        old_logp = c.logprobs[:, : logp.shape[1]]
        assert (logp - old_logp)[batch.mask].abs().max() < 1e-4
        assert (untempered - old_logp)[batch.mask].abs().max() > 1e-2


class Forgetful(Sampler):
    """A sampler whose KV cache is gone before every layer: each prompt is prefilled whole."""

    def extend(self, *args, **options):
        self.refresh()
        return super().extend(*args, **options)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_reused_cache_changes_nothing(policy, task, shape):
    """Catches a wrong position, mask or order in the reused KV cache: token for token, a rollout is
    that of a sampler which prefills every prompt from its beginning. What is prefilled of a reused
    prompt is the phrase, and the last token of a truncated answer."""
    results, prefilled = [], []
    for kind in (Sampler, Forgetful):
        sampler, tokens = kind(policy), []
        sampler.model.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0].shape))
        results.append(rollout(sampler, task, task.problems, shape, SAMPLING))
        prefilled.append(tokens)
    for reused, fresh in zip(*results):
        assert reused.completions.sampled == fresh.completions.sampled
        torch.testing.assert_close(
            reused.completions.logprobs, fresh.completions.logprobs, atol=1e-4, rtol=0
        )
    longest = longest_phrase(task.encoding)
    assert [width for _, width in prefilled[0][1:]] == [longest + 1] * (len(shape) - 1)
    assert min(width for _, width in prefilled[1][1:]) > 2 * longest


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rollout_is_a_function_of_its_seed(policy, task, shape):
    """Catches hidden randomness: two samplers give one rollout bit for bit, another seed gives
    another."""
    first, again, other = (
        rollout(Sampler(policy), task, task.problems, shape, SAMPLING._replace(seed=seed))
        for seed in (5, 5, 6)
    )
    for a, b, c in zip(first, again, other):
        assert torch.equal(a.completions.tokens, b.completions.tokens)
        assert torch.equal(a.completions.logprobs, b.completions.logprobs)
        assert a.phrases == b.phrases and a.texts == b.texts != c.texts


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_samples_its_part_of_the_whole(policy, task, shape):
    """Catches random numbers or phrases that depend on the batch: questions 1 and 2 alone, as a
    second rank gets them, have the trees that they have among all three."""
    whole = rollout(Sampler(policy), task, task.problems, shape, SAMPLING)
    sampling = SAMPLING._replace(first_row=shape[0])
    part = rollout(Sampler(policy), task, task.problems[1:], shape, sampling)
    for a, b in zip(whole, part):
        rows = (a.questions > 0).nonzero()[:, 0].tolist()
        assert [a.completions.sampled[row] for row in rows] == b.completions.sampled
        assert a.completions.numbers[rows].tolist() == b.completions.numbers.tolist()
        assert b.phrases is None or [a.phrases[row] for row in rows] == b.phrases


def test_rows_with_a_gradient_are_active(encoding):
    """Catches rows left out of the pass that a KL term acts on, and discarded rows taken in."""
    (first, second), _, _ = scripted_rollout(encoding)
    second = replace(second, advantages=torch.tensor([R, 0, 0, 0, 0, 0, R, 0]))
    assert first.active(0.0).all() and second.active(0.0).nonzero().flatten().tolist() == [0, 6]
    assert second.active(0.1).tolist() == second.correct.tolist()
