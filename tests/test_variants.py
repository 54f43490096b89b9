"""variants/: every method's formula against worked cases; constants, and the page that lists them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED

import train
from mgrpo import GRPO, MGRPO, choose_sources, credit, group_advantages
from runtime.flags import parse_flags
from tasks.problems import Problem
from variants import (
    dagrpo,
    disco,
    dr_grpo,
    e_grpo,
    edge,
    gcpo,
    group_dro,
    grpo_care,
    grpo_lead,
    igrpo,
    lambda_grpo,
    nthr,
    raft,
    rloo,
    unlikely,
    veripo,
    ws_grpo,
)
from variants.table import METHODS, markdown, method_of, with_constants

GOLDEN = SHARED / "golden" / "methods.json"
CASES = json.loads(GOLDEN.read_text())["methods"] if GOLDEN.exists() else {}


def cases(name):
    """A parametrize over the worked cases of a method."""
    found = CASES.get(name, [])
    if not found:
        skip = pytest.mark.skip(reason=f"needs {GOLDEN.name}, which is not part of this repository")
        return pytest.mark.parametrize("given, expected", [pytest.param(None, None, marks=skip)])
    return pytest.mark.parametrize(
        "given, expected",
        [pytest.param(SimpleNamespace(**c["inputs"]), c["expected"], id=c["name"]) for c in found],
    )


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def flags(values):
    return torch.tensor(values).bool()


def mask_of(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def relative(rewards):
    """Equation (1) of one group, in float64."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if rewards.min() == rewards.max():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def same(found, expected):
    expected = numbers(expected)
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), expected, atol=1e-6, rtol=1e-6
    )


def test_the_page_has_the_table():
    """Catches a method that docs/relatives.md does not list."""
    assert markdown() in (ROOT / "docs/relatives.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", ["cpu", "gpu", "smoke", "paper"])
@pytest.mark.parametrize("name", METHODS)
def test_every_preset_goes_with_every_method(name, preset):
    """Catches a method that gets MGRPO's settings from a preset, and is refused for them."""
    words = ["--method", name, "--preset", preset]
    config = parse_flags(train.Config, "", train.presets, words)
    train.check(config)
    if name != "mgrpo":
        assert config.method_args == () and config.kl_coef == METHODS[name].flags.get("kl_coef", 0)


WORDS = (
    # text -> what it computes, whether its work ends where its answer does
    ("<think>1+3=4, 4*2=8</think><answer>1 4 8</answer>", [4, 8], True),
    ("<think>off by 8-4=4: no. 1+3=4, 4*2=8</think><answer>1 4 8</answer>", [4, 8], True),
    ("<think>2+3=5, 5*2=10, off by 8-10=9: no. 1+3=4</think><answer>1 4</answer>", [4], True),
    ("<think>off by 8-8=0: yes</think><answer>1 4 8</answer>", [4, 8], True),
    ("<think>1+3=4, 4*2=9</think><answer>1 4 8</answer>", [4, 9], False),
    ("<think>1+3=4", [4], False),
)


@pytest.mark.parametrize("text, values, sound", WORDS)
def test_a_review_is_no_work(text, values, sound):
    """Catches the numbers of a review ("off by 8-4=4") taken for values of the answer's own; and a
    task without steps whose answers all count as inconsistent."""
    assert e_grpo.matched_values(e_grpo.own_work(text), values) == (len(values), len(values))
    assert veripo.consistent(text, Problem("1+3 = ? (mod 11)", "4", None)) == sound
    assert veripo.consistent(text, Problem("3, 4: make 7", frozenset(), None))


def test_spans_of_tokens():
    """Catches spans that move by a byte that is no text, by a token of several marks, or by an
    answer that was opened and not closed."""
    pieces = [b"<think>", b"1", b", ", b"\xff", b"2,", b"</think>", b"<answer>", b"5", b" 6"]
    pieces += [b"</answer>"]
    assert ws_grpo.step_ends(pieces) == [2, 4]
    assert grpo_care.answer_span(pieces) == (7, 9)
    assert grpo_care.answer_span([*pieces, b"<answer>"]) == (7, 9)
    assert grpo_care.answer_span(pieces[:-1]) == (0, 0)
    assert ws_grpo.step_ends(pieces[:5]) == ws_grpo.step_ends([b"<think>", b"</think>"]) == []


def test_constants_are_bound():
    """Catches a constant of --method-args that no function gets, or that changes the method for all
    later runs of this process."""
    assert method_of("disco", ["beta=2", "delta=0.5"]).constraint(1.0) == 1.0
    assert method_of("veripo", ["beta=0.5"]).then.advantage.keywords == dict(beta=0.5)
    assert method_of("gcpo", ["alpha=3"]).advantage.keywords == dict(alpha=3.0)
    changed = method_of("grpo-care", ["decay=0.5", "follow_every=3", "siblings=parent"])
    assert (changed.decay, changed.follow_every, changed.siblings) == (0.5, 3, "parent")
    for name in ("disco", "veripo", "gcpo", "grpo-care"):
        assert method_of(name) == METHODS[name]
    with pytest.raises(ValueError, match="follow_every must be a whole number from 1 to"):
        method_of("grpo-care", ["follow_every=1.5"])


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        ("DISCO", [], "did you mean disco"),
        ("disco", ["tua=1"], "did you mean tau"),
        ("disco", [" tau = 1", "tau=2"], "tau is given twice"),
        ("disco", ["beta=inf"], "beta must be a number from 0 to"),
        ("disco", ["delta=-1"], "delta must be a number from 0 to 1"),
        ("grpo-care", ["decay=2"], "decay must be a number from 0 to 1"),
        ("group-dro", ["rate=-0.1"], "rate must be a number from 0 to"),
        ("dagrpo", ["anchors=2"], "anchors must be a whole number from 0 to 1"),
        ("edge", ["floor=5", "ceiling=0.1"], "floor is above ceiling"),
        ("edge", ["ceiling=0.05"], "floor is above ceiling"),
        ("ws-grpo", ["least=9", "most=1"], "least is above most"),
        ("rloo", ["failed=raw"], "rloo has an advantage of its own"),
        ("igrpo", ["sources=all"], "igrpo has no constant 'sources'"),
    ],
)
def test_a_constant_out_of_bounds_is_one_sentence(name, arguments, says):
    """Catches a constant that is taken, and does something else than its method's, or nothing."""
    with pytest.raises(ValueError, match=says):
        method_of(name, arguments)


# ---- worked cases --------------------------------------------------------------------------------


def layer_of(number, correct, parents, questions):
    """A scored layer without completions."""
    correct = torch.tensor(correct).bool()
    blank = torch.zeros_like(correct)
    return SimpleNamespace(
        number=number,
        correct=correct,
        rewards=correct.float(),
        parents=torch.tensor(parents),
        questions=torch.tensor(questions),
        **dict.fromkeys(("undecided", "truncated", "changed", "fresh"), blank),
        lengths=blank.long(),
        given=None,
        sampled_correct=None,
        active=lambda kl_coef: blank,
        observed={},
    )


@cases("mgrpo_layer2")
def test_corrections(given, expected):
    rewards, answers = given.rewards, len(given.rewards)
    parents = [i for i, row in enumerate(rewards) for _ in row]
    layer = layer_of(2, [x for row in rewards for x in row], parents, [0] * len(parents))
    siblings = dict(attempt="parent").get(given.group, given.group)
    credit([layer], with_constants(MGRPO, dict(failed=given.failed, siblings=siblings)))
    same(layer.advantages.view(answers, -1), expected["advantages"])
    assert layer.trained.view(answers, -1).tolist() == expected["trained"]


@cases("layers")
def test_layers(given, expected):
    method, layers = with_constants(GRPO, dict(siblings="parent")), []
    rows = torch.arange(given.questions)
    for number, (width, right) in enumerate(zip(given.widths, given.correct), 1):
        parents = rows.repeat_interleave(width)
        questions = parents if number == 1 else layers[-1].questions[parents]
        layers.append(layer_of(number, right, parents.tolist(), questions.tolist()))
        rows = choose_sources(layers[-1], given.select)
        if not len(rows):
            break
    credit(layers, method)
    assert [len(layer.correct) for layer in layers] == [n for n in expected["rows"] if n]
    for layer, wanted in zip(layers, expected.get("layers", [])):
        assert layer.parents.tolist() == wanted["parents"]
        assert layer.questions.tolist() == wanted["questions"]
        same(layer.advantages, wanted["advantages"])
        if layer.number > 1:
            sums = train.layer_sums(layers, layer.number)
            same(
                [sums[k] / sums["rows"] for k in ("fix", "broke")], [wanted["fix"], wanted["broke"]]
            )


@cases("grpo")
def test_grpo_and_dr_grpo(given, expected):
    rewards = torch.tensor(given.rewards).float()
    advantages = group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.long))
    same(advantages, expected["advantages"])
    group = SimpleNamespace(rewards=rewards, advantages=advantages)
    same(dr_grpo.centred(group), expected["no_std"])
    n = len(rewards)
    same(rloo.leave_one_out(group), [x * n / max(n - 1, 1) for x in expected["no_std"]])


@cases("wsgrpo")
def test_ws_grpo(given, expected):
    sums, counts = ([f(p) for p in given.step_pref] for f in (sum, len))
    rewards = ws_grpo.shared_out(
        numbers(sums), numbers(counts), numbers(given.correct), given.lam_step, given.lam_out,
        given.pen, given.lo, given.hi,
    )  # fmt: skip
    same(rewards, expected["rewards"])
    same(relative(rewards), expected["advantages"])


@cases("igrpo")
def test_igrpo(given, expected):
    if "expected" in expected:  # of the best of N drafts
        found = [1 - (1 - p) ** given.N for p in given.p]
        assert found == pytest.approx(expected["expected"])
        return
    n = len(given.draft_rewards)
    layer = SimpleNamespace(
        rewards=numbers(given.draft_rewards),
        correct=numbers(given.draft_rewards) > 0,
        questions=torch.zeros(n, dtype=torch.long),
        completions=SimpleNamespace(numbers=torch.arange(n)),
    )
    chosen = {choose_sources(layer, igrpo.best_drafts, seed).tolist()[0] for seed in range(40)}
    assert chosen == set(expected["best_drafts"])
    right = numbers(given.draft_rewards) > 0
    drafts = SimpleNamespace(number=1, correct=right)
    assert igrpo.refinements(drafts).tolist() == expected["drafts_trained"]
    assert igrpo.refinements(SimpleNamespace(number=2, correct=right)).all()
    same(relative(given.refined_rewards), expected["refined_advantages"])


@cases("dagrpo")
def test_dagrpo(given, expected):
    keep = dagrpo.far_apart(flags(given.correct), numbers(given.score), given.delta)
    assert keep.tolist() == expected["keep"]
    same(relative(given.correct) * keep, expected["advantages"])


@cases("egrpo")
def test_e_grpo(given, expected):
    rewards = e_grpo.shared_credit(
        flags(given.correct), numbers(given.matched), numbers(given.ok), given.alpha
    )
    same(rewards, expected["rewards"])
    same(relative(rewards), expected["advantages"])


@cases("egrpo_entities")
def test_e_grpo_entities(given, expected):
    found = e_grpo.matched_values(given.think, given.gold_values)
    assert found == (expected["matched"], expected["entities"])


@cases("lambda_grpo")
def test_lambda_grpo(given, expected):
    parents = torch.zeros(len(given.ids))
    group = SimpleNamespace(
        tokens=torch.tensor(given.ids), mask=mask_of(given.lengths), parents=parents
    )
    same(lambda_grpo.one_over_sharing(group), expected["weights"])


@cases("gcpo")
def test_gcpo(given, expected):
    z, without, fused = (numbers(x) for x in (given.z, given.without, given.fused))
    found = gcpo.times_cosine(relative(given.rewards), z, without, fused, given.alpha)
    same(found, expected["advantages"])


@cases("edge")
def test_edge(given, expected):
    mask = mask_of(given.lengths)
    group = SimpleNamespace(
        advantages=relative(given.rewards), entropy=numbers(given.entropy), mask=mask
    )
    same(edge.by_confidence(group, floor=1e-6), expected["advantages"])


@cases("edge_gec")
def test_edge_gec(given, expected):
    assert edge.planned([bool(x) for x in given.perfect], given.u) == expected["plan"]


@cases("care")
def test_grpo_care(given, expected):
    rewards = grpo_care.with_bonus(
        numbers(given.total), flags(given.accuracy), numbers(given.confidence), given.coef,
        given.cap, given.margin,
    )  # fmt: skip
    same(rewards, expected["rewards"])
    same(relative(rewards), expected["advantages"])


@cases("care_confidence")
def test_grpo_care_confidence(given, expected):
    found = grpo_care.confidence(numbers(given.ref_logp), given.answer_span)
    assert found == pytest.approx(expected["confidence"], abs=1e-6)


@cases("unlikely")
def test_unlikely(given, expected):
    rewards = numbers(given.rewards)
    group = SimpleNamespace(
        rewards=rewards,
        correct=rewards > 0.5,
        old_logp=numbers(given.mean_old_logp)[:, None],
        mask=flags([[1]] * len(rewards)),
    )
    shaped = unlikely.rarely_said(group, given.beta)
    same(shaped, expected["rewards"])
    same(relative(shaped) * unlikely.mixed(group), expected["advantages"])


@cases("veripo")
def test_veripo(given, expected):
    pairs = veripo.pair_up(*map(flags, (given.correct, given.consistent, given.formatted)))
    assert pairs.nonzero().tolist() == expected["pairs"]
    now, then = numbers(given.summed_logp), numbers(given.summed_ref_logp)
    found = -veripo.slopes(now, then, pairs, given.beta) / max(len(expected["pairs"]), 1)
    same(found, expected["slopes"])


@cases("nthr")
def test_nthr(given, expected):
    mask = mask_of(given.lengths)
    onehot = numbers([[[float(i == v) for v in given.vocab] for i in row] for row in given.ids])
    weights = nthr.alike(
        numbers(given.rewards) > 0.5, numbers(given.hidden), onehot - numbers(given.probs), mask,
        given.beta,
    )  # fmt: skip
    same(weights, expected["weights"])


@cases("disco")
def test_disco(given, expected):
    tau = float("inf") if given.basic else given.tau
    for rewards, scores, slopes in zip(given.rewards, given.scores, expected["slopes"]):
        found = disco.discriminate(numbers(rewards) > 0.5, numbers(scores), tau)
        same(-found / len(given.rewards), slopes)


@cases("disco_constraint")
def test_disco_constraint(given, expected):
    found = disco.held_to(given.kl, given.delta, given.beta)
    assert found == pytest.approx(expected["coefficient"])


@cases("raft")
def test_raft(given, expected):
    from mgrpo import policy_loss

    rewards = torch.tensor(given.rewards).float()
    group = SimpleNamespace(rewards=rewards)
    for name, advantages, surrogate in (
        ("loss_raft", raft.positives(group), "likelihood"),
        ("loss_raft_pp", raft.positives(group), "clipped"),
        ("loss_rej", raft.of_mixed_groups(group), "clipped"),
    ):
        loss, _ = policy_loss(
            torch.tensor(given.logp), torch.tensor(given.old_logp), advantages,
            mask_of(given.lengths), normalize="token", surrogate=surrogate,
        )  # fmt: skip
        assert loss.item() == pytest.approx(expected[name], abs=1e-6)


@cases("lead")
def test_grpo_lead(given, expected):
    rewards = grpo_lead.by_length(
        flags(given.correct), numbers(given.lengths), flags(given.unparseable), given.alpha,
        given.min_len,
    )  # fmt: skip
    same(rewards, expected["rewards"])
    group = SimpleNamespace(rewards=rewards, advantages=relative(rewards))
    same(grpo_lead.by_difficulty(group), expected["advantages"])


@cases("group_dro")
def test_group_dro(given, expected):
    q = {str(k): x for k, x in enumerate(given.q)}
    losses = {str(k): x for k, x in enumerate(given.loss) if x is not None}
    found = list(group_dro.weighed(q, losses, given.step).values())
    same(found, expected["q"])
    same([x * len(q) for x in found], expected["question_weight"])
