"""Every method's gradient, on a tiny model, against its formula written out row by row without packing:
groups that are all right, all wrong, mixed, and of a single answer."""

import copy
import itertools
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import END
from test_mgrpo import FixedTask, ScriptedSampler
from test_train import config_of, gradient

import train
from engine.keys import hash_seed
from mgrpo import MAX_LOG_RATIO
from runtime import distributed
from tasks.problems import Problem
from variants.table import METHODS

PROBLEM = Problem("x in {1, 2, 5}, (x+3)*2 = 8 (mod 11)", "1 4 8", None)
RIGHT = "<think>1+3=4, 4*2=8</think><answer>1 4 8</answer>"
WRONG = (  # none, one and two values right; no thought; no answer, which is truncated; not consistent
    "<think>2+3=5, 5*2=10</think><answer>2 5 10</answer>",
    "<think>1+3=4, 4*2=9, 9*1=9</think><answer>1 4 9</answer>",
    "<think>1+3=4, 4*2=8</think><answer>1 4 7</answer>",
    "<answer>7</answer>",
    "<think>2+3=5",
)
RIGHT_TOO = (
    "<think>off by 8-4=4: no. 1+3=4, 4*2=8</think><answer>1 4 8</answer>",
    "<think>8</think><answer>1 4 8</answer>",
    "<think>1+3=4, 4*2=9</think><answer>1 4 8</answer>",
)
VALUES = [4, 8]


class Drift:
    """An optimiser that keeps each step's gradient, and the weights before it, and then moves the
    policy a little, so that the next step is off-policy."""

    def __init__(self, policy):
        self.policy, self.gradients, self.weights = policy, [], []
        self.param_groups = [dict(lr=0.0)]
        self.random = torch.Generator().manual_seed(3)

    def step(self):
        self.gradients.append(gradient(self.policy))
        self.weights.append(copy.deepcopy(self.policy.state_dict()))
        with torch.no_grad():
            for p in self.policy.parameters():
                p += 0.02 * p.std() * torch.randn(p.shape, generator=self.random)

    def zero_grad(self, set_to_none):
        self.policy.zero_grad()


def written(layer, number):
    """What row `number` says: question 0 is all right, 1 all wrong, 2 and 3 are mixed."""
    draw = hash_seed(7, layer, number)
    question = number // ROWS[layer - 1]
    right = question == 0 or (question > 1 and draw % 2 == 0)
    texts = (RIGHT, *RIGHT_TOO) if right else WRONG
    return texts[(draw >> 8) % len(texts)]


ROWS = [6]  # a question's rows in each layer


def grown(name, gpt, encoding, monkeypatch, sizes, **values):
    """A step of the method -> the optimiser, layers, config, reference, memory."""
    monkeypatch.setattr(f"{__name__}.ROWS", [math.prod(sizes[: k + 1]) for k in range(len(sizes))])
    method = METHODS[name]
    own = {k: v for k, v in method.flags.items() if k not in ("group_sizes", "epochs")}
    values = dict(max_new_tokens=40, tokens_per_microbatch=150) | own | values
    config = config_of(sizes, method=name, **values)
    reference = copy.deepcopy(gpt).requires_grad_(False)
    with torch.no_grad():
        reference.embed.weight.mul_(1.05)
    clip = distributed.clip_gradient
    monkeypatch.setattr(distributed, "clip_gradient", lambda policy, norm: clip(policy, 1e9))
    task = FixedTask(encoding, [PROBLEM] * 4, max_new_tokens=40)
    sampler, drift, memory = ScriptedSampler(encoding, written, gpt), Drift(gpt), {}
    start = copy.deepcopy(gpt)
    _, layers, _ = train.step(gpt, reference, sampler, drift, task, config, 0, 0, memory)
    return SimpleNamespace(
        drift=drift, layers=layers, config=config, reference=reference, memory=memory, start=start
    )


# ---- rows, one by one ----------------------------------------------------------------------------


def row_of(run, policy, layer, i):
    """All that formulas need of a row, computed alone, under weights that are in `policy` now."""
    c, T = layer.completions, run.config.temperature
    prompt, sampled = c.prompts[i // c.n], c.sampled[i]

    def looked_at(model):
        vectors = model(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
        logits = vectors @ model.head.weight.T / T
        return vectors, logits.log_softmax(-1)

    now = looked_at(policy)[1]
    target = torch.tensor(sampled)[:, None]
    with torch.no_grad():
        vectors, logs = looked_at(run.start)
        ref_vectors, ref_logs = looked_at(run.reference)
    text = layer.texts[i]
    return SimpleNamespace(
        i=i,
        layer=layer.number,
        question=int(layer.questions[i]),
        parent=int(layer.parents[i]),
        text=text,
        ids=sampled,
        n=len(sampled),
        right="<answer>1 4 8</answer>" in text,
        ended=sampled[-1] == END,
        lp=now.gather(1, target)[:, 0],
        old=c.logprobs[i, : len(sampled)],
        start=logs.gather(1, target)[:, 0],
        ref=ref_logs.gather(1, target)[:, 0],
        entropy=-(logs.exp() * logs).sum(-1),
        probabilities=logs.exp(),
        h=vectors,
        ref_h=ref_vectors,
        weight=torch.ones(len(sampled)),
        keep=True,
    )


def values_right(row):
    work = row.text.split("</think>")[0].split(": no. ")[-1]
    stated = [int(x) for x in re.findall(r"=(\d+)", work)]
    return sum(a == b for a, b in zip(stated, VALUES))


def formed(row):
    thought = ("<think>" in row.text, "</think>" in row.text)
    return row.ended and thought in ((True, True), (False, False))


def equation_1(rewards):
    if max(rewards) - min(rewards) == 0:
        return [0.0] * len(rewards)
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-4) for r in rewards]


def token_bytes(run, row):
    encoding = run.layers[0].encoding
    return [encoding.decode([t]) for t in row.ids if t != END]


# ---- the formulas: of one group of rows -> their advantages; row.keep, row.weight ---------------


def grpo(run, rows):
    return equation_1([float(r.right) for r in rows])


def dr_grpo(run, rows):
    mean = statistics.mean(r.right for r in rows)
    return [r.right - mean for r in rows]


def rloo(run, rows):
    if len(rows) == 1:
        return [0.0]
    total = sum(r.right for r in rows)
    return [r.right - (total - r.right) / (len(rows) - 1) for r in rows]


def ws_grpo(run, rows):
    f = run.memory["preference"]
    rewards = []
    for row in rows:
        if (
            "</think>" not in row.text
            or row.text.startswith("<think></think>")
            or ("<think>" not in row.text)
        ):
            ends = []
        else:
            pieces = token_bytes(run, row)
            close = pieces.index("</think>")
            ends = [t for t in range(1, close) if "," in pieces[t]] + [close - 1]
        at = [row.ref_h[0]] + [row.ref_h[t + 1] for t in ends]
        scores = [float(torch.relu(v @ f["w1"] + f["b1"]) @ f["w2"]) for v in at]
        p = [1 / (1 + math.exp(a - b)) for a, b in itertools.pairwise(scores)]
        rewards.append((sum(p) + 5 * row.right) / max(len(p), 1))
    return equation_1(rewards)


def igrpo(run, rows):
    for row in rows:
        row.keep = row.layer == 2
    return grpo(run, rows)


def dagrpo(run, rows):
    for row in rows:
        apart = [abs(values_right(row) - values_right(o)) / 2 for o in rows if o.right != row.right]
        row.keep = max(apart, default=0) >= 0.1
    return grpo(run, rows)


def e_grpo(run, rows):
    most = max(values_right(r) for r in rows)
    rewards = []
    for row in rows:
        row.keep = formed(row)
        share = values_right(row) / most if most else 0.0
        rewards.append((1.0 if row.right else 0.3 * share) if row.keep else 0.0)
    return equation_1(rewards)


def lambda_grpo(run, rows):
    for row in rows:
        for t in range(row.n):
            same = [
                o for o in rows if o.parent == row.parent and o.ids[: t + 1] == row.ids[: t + 1]
            ]
            row.weight[t] = 1 / len(same)
    return grpo(run, rows)


def gcpo(run, rows):
    z = [r.h[-1] for r in rows]
    mean = sum(z) / len(z)
    advantages = []
    for A, row, own in zip(grpo(run, rows), rows, z):
        direction = mean
        if row.layer == 1 and len(run.layers) > 1:
            children = [r for r in run.rows if r.layer == 2 and r.question == row.question]
            mine = [r.h[-1] for r in children if r.parent == row.i]
            others = [r.h[-1] for r in children if r.parent != row.i]
            direction = mean + sum(others) / len(others) - sum(mine) / len(mine)
        cosine = own @ direction / (own.norm() * direction.norm())
        advantages.append(A * 2 * float(cosine))
    return advantages


def edge(run, rows):
    P = [float(r.entropy.mean()) for r in rows]
    share = [min(max(p / statistics.mean(P), 0.1), 10) for p in P]
    return [A / s for A, s in zip(grpo(run, rows), share)]


def grpo_care(run, rows):
    confidence = []
    for row in rows:
        pieces = token_bytes(run, row)
        if "</answer>" in pieces:
            span = slice(pieces.index("<answer>") + 1, pieces.index("</answer>"))
            confidence.append(min(float(row.ref[span].mean().exp()), 0.95))
        else:
            confidence.append(0.0)
    right = [c for c, row in zip(confidence, rows) if row.right]
    rewards = [
        row.right * (1 + 0.5 * (c >= statistics.mean(right))) if row.right else 0.0
        for c, row in zip(confidence, rows)
    ]
    return equation_1(rewards)


def unlikely(run, rows):
    means = [float(r.old.mean()) for r in rows]
    order = sorted(range(len(rows)), key=means.__getitem__)  # stable, as equal ones are ranked
    rewards = [r.right * (1 - 0.25 * order.index(i) / len(rows)) for i, r in enumerate(rows)]
    for row in rows:
        row.keep = 0 < sum(r.right for r in rows) < len(rows)
    return equation_1(rewards)


def nthr(run, rows):
    p = sum(r.right for r in rows) / len(rows)
    if 0 < p < 1:
        vocabulary = sorted({t for r in rows for t in r.ids})

        def g(row, t):
            onehot = torch.tensor([float(row.ids[t] == v) for v in vocabulary])
            return onehot - row.probabilities[t][vocabulary]

        right = [(g(r, t), r.h[t]) for r in rows if r.right for t in range(r.n)]

        def s(row, t):
            a, h = g(row, t), row.h[t]
            return sum(float(a @ b) * float(h @ k) for b, k in right)

        tau = min(statistics.mean(s(r, t) for t in range(r.n)) for r in rows if r.right)
        for row in rows:
            if not row.right:
                for t in range(row.n):
                    row.weight[t] = 2 * abs(0.5 - p) if s(row, t) > tau else 1.0
    return grpo(run, rows)


def raft(run, rows):
    return [float(r.right) for r in rows]


def reinforce_rej(run, rows):
    mixed = 0 < sum(r.right for r in rows) < len(rows)
    return [(1.0 if r.right else -1.0) * mixed for r in rows]


def grpo_lead(run, rows):
    lengths, rewards = [r.n for r in rows if r.right], []
    for row in rows:
        if "</answer>" not in row.text:
            rewards.append(0.0)
        elif row.right:
            std = statistics.stdev(lengths) if len(lengths) > 1 else 1.0
            z = (row.n - statistics.mean(lengths)) / (std + 1e-6)
            rewards.append(math.exp(-0.05 * z))
        else:
            rewards.append(-1.0)
    if max(rewards) <= 0 or min(rewards) == max(rewards) == 1:
        return [0.0] * len(rows)
    share = sum(r > 0 for r in rewards) / len(rows)
    w = lambda x: 0.4 + 1.1 / (1 + math.exp(10 * (x - 0.75)))
    return [A * (w(share) if A > 0 else w(1 - share)) for A in equation_1(rewards)]


FORMULAS = {
    "grpo": grpo,
    "dr-grpo": dr_grpo,
    "rloo": rloo,
    "ws-grpo": ws_grpo,
    "dagrpo": dagrpo,
    "e-grpo": e_grpo,
    "lambda-grpo": lambda_grpo,
    "gcpo": gcpo,
    "edge": edge,
    "grpo-care": grpo_care,
    "unlikely": unlikely,
    "nthr": nthr,
    "raft": raft,
    "raft++": raft,
    "reinforce-rej": reinforce_rej,
    "grpo-lead": grpo_lead,
    "group-dro": grpo,  # a single kind of questions has weight 1
}


def surrogate_loss(run, rows, likelihood):
    """The loss of one layer's rows from advantages, as --normalize says."""
    config, loss = run.config, 0.0
    low, high = config.clip[0], config.clip[-1]
    for row in rows:
        if not row.keep:
            continue
        ratio = (row.lp - row.old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        gain = torch.min(ratio * row.A, ratio.clamp(1 - low, 1 + high) * row.A)
        if likelihood:
            gain = row.lp * row.A
        gain = gain * row.weight
        if config.kl_coef:
            d = row.ref - row.lp
            gain = gain - config.kl_coef * (d.exp() - 1 - d)
        if config.normalize == "sequence":
            loss = loss - gain.mean() / len(rows)
        elif config.normalize == "token":
            loss = loss - gain.sum() / sum(r.n for r in rows)
        else:
            loss = loss - gain.sum() / (len(rows) * config.max_new_tokens)
    return loss


def by_formula(run, policy, name, part):
    """The gradient of optimiser step `part` by the method's formula."""
    policy.load_state_dict(run.drift.weights[part])
    policy.zero_grad()
    run.rows = [
        row_of(run, policy, layer, i) for layer in run.layers for i in range(len(layer.texts))
    ]
    loss = 0.0
    for layer in run.layers:
        rows = [
            r for r in run.rows
            if r.layer == layer.number and r.question % run.config.minibatches == part
        ]  # fmt: skip
        for question in {r.question for r in rows}:
            group = [r for r in rows if r.question == question]
            for row, A in zip(group, FORMULAS[name](run, group)):
                row.A = A
        likelihood = METHODS[name].surrogate == "likelihood"
        loss = loss + surrogate_loss(run, rows, likelihood)
    loss.backward()
    return gradient(policy)


def close(found, expected, least=1e-4):
    assert expected.norm() > least
    assert (found - expected).norm() < 2e-4 * expected.norm()


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_is_the_formulas(name, gpt, encoding, monkeypatch):
    """Two optimiser steps of six answers to four questions, the second one off-policy."""
    run = grown(name, gpt, encoding, monkeypatch, (6,), minibatches=2)
    assert len(run.drift.gradients) == 2
    for part, found in enumerate(run.drift.gradients):
        close(found, by_formula(run, gpt, name, part))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_single_answer_has_no_siblings(name, gpt, encoding, monkeypatch):
    """Groups of one: no gradient but for methods that pay a right answer as such."""
    run = grown(name, gpt, encoding, monkeypatch, (1,), minibatches=1)
    if name in ("raft", "raft++"):
        close(run.drift.gradients[0], by_formula(run, gpt, name, 0))
    elif name == "unlikely":  # its KL term remains only where a row is trained
        assert not run.drift.gradients
    else:
        assert not run.drift.gradients


@pytest.mark.parametrize("name", ["gcpo", "edge", "lambda-grpo"])
def test_the_gradient_of_two_layers_is_the_formulas(name, gpt, encoding, monkeypatch):
    """In the second layer siblings are all corrections of a question."""
    run = grown(name, gpt, encoding, monkeypatch, (3, 2), minibatches=1)
    close(run.drift.gradients[0], by_formula(run, gpt, name, 0))


def test_igrpo_trains_refinements_alone(gpt, encoding, monkeypatch):
    monkeypatch.setitem(FORMULAS, "igrpo", igrpo)
    run = grown("igrpo", gpt, encoding, monkeypatch, (3, 4), minibatches=1)
    assert [len(layer.texts) for layer in run.layers] == [12, 16]
    for parent in run.layers[1].parents.tolist():
        layer = run.layers[0]
        same = layer.questions == layer.questions[parent]
        assert layer.rewards[parent] == layer.rewards[same].max()
    close(run.drift.gradients[0], by_formula(run, gpt, "igrpo", 0))


def edge_gec(run, rows):
    """Layer 1: the answer of a correction is paid what it is paid. Layer 2: the answer's advantage."""
    if rows[0].layer == 2:
        return [next(r.A for r in run.rows if r.layer == 1 and r.i == row.parent) for row in rows]
    below = {r.parent: r.right for r in run.rows if r.layer == 2}
    rewards = [float(below.get(r.i, r.right)) for r in rows]
    P = [float(r.entropy.mean()) for r in rows]
    share = [min(max(p / statistics.mean(P), 0.1), 10) for p in P]
    return [A / s for A, s in zip(equation_1(rewards), share)]


def test_edge_gec_trains_what_was_put_there(gpt, encoding, monkeypatch):
    """Answers that were told the answer, or replaced by the solution, are right and trained at ratio
    1; those that reflect are paid like their correction, and both are trained."""
    monkeypatch.setitem(FORMULAS, "edge-gec", edge_gec)
    run = grown("edge-gec", gpt, encoding, monkeypatch, (6, 1), minibatches=1)
    first, second = run.layers
    given = first.given.nonzero()[:, 0].tolist()
    assert len(given) > 2 and len(second.texts) > 2
    assert not set(given) & set(second.parents.tolist())
    solutions = [i for i in given if first.texts[i] == RIGHT]
    assert 0 < len(solutions) < len(given)
    for i in given:
        assert first.correct[i] and first.texts[i].endswith("<answer>1 4 8</answer>")
        prompt, sampled = first.completions.prompts[i // 6], first.completions.sampled[i]
        with torch.no_grad():
            logits = run.start(torch.tensor([prompt + sampled]))[0, len(prompt) - 1 : -1]
            logs = (logits @ run.start.head.weight.T / run.config.temperature).log_softmax(-1)
        own = logs.gather(1, torch.tensor(sampled)[:, None])[:, 0]
        kept = first.completions.logprobs[i, : len(sampled)]
        torch.testing.assert_close(kept, own, atol=1e-4, rtol=1e-4)
    close(run.drift.gradients[0], by_formula(run, gpt, "edge-gec", 0))


def test_dagrpo_anchors_lost_groups(gpt, encoding, monkeypatch):
    """The last answer of the question that nobody solved is the solution, and is trained with the
    others; the other questions are as they were."""
    monkeypatch.setitem(FORMULAS, "dagrpo", dagrpo)
    anchors = dict(minibatches=1, method_args=("anchors=1",))
    run = grown("dagrpo", gpt, encoding, monkeypatch, (6,), **anchors)
    (layer,) = run.layers
    assert layer.given.nonzero()[:, 0].tolist() == [11] and layer.texts[11] == RIGHT
    assert layer.active(0)[6:12].any()
    close(run.drift.gradients[0], by_formula(run, gpt, "dagrpo", 0))


def test_disco_is_its_loss(gpt, encoding, monkeypatch):
    """The loss itself, differentiated: log-mean-exp of wrong answers minus the mean of right ones,
    over all questions; in the second step the KL is above its limit, and held."""
    run = grown("disco", gpt, encoding, monkeypatch, (6,), minibatches=2)
    for part, found in enumerate(run.drift.gradients):
        gpt.load_state_dict(run.drift.weights[part])
        gpt.zero_grad()
        layer = run.layers[0]
        rows = [row_of(run, gpt, layer, i) for i in range(24)]
        rows = [r for r in rows if r.question % 2 == part]
        loss = 0.0
        for question in {r.question for r in rows}:
            right, wrong = (
                [r.lp.mean() for r in rows if r.question == question and r.right == verdict]
                for verdict in (True, False)
            )
            if right and wrong:
                wrong, right = torch.stack(wrong), torch.stack(right)
                loss = loss + 10 * (wrong / 10).exp().mean().log() - right.mean()
        loss = loss / len({r.question for r in rows})
        kl = sum((r.old - r.lp).sum() for r in rows) / sum(r.n for r in rows)
        weight = 1e3 * max(kl.item() - 1e-4, 0.0)
        assert (weight > 0) == (part == 1)
        (loss + weight * kl).backward()
        close(found, gradient(gpt))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_veripo_is_grpo_and_then_dpo(kl_coef, gpt, encoding, monkeypatch):
    """The third and fourth optimiser steps are those of -log σ, differentiated, with the weights at
    the start of that stage as reference; the fourth has moved away from them. A KL term is in the
    first two alone."""
    run = grown("veripo", gpt, encoding, monkeypatch, (6,), minibatches=2, kl_coef=kl_coef)
    assert len(run.drift.gradients) == 4
    monkeypatch.setitem(FORMULAS, "veripo", grpo)
    for part in (0, 1):
        close(run.drift.gradients[part], by_formula(run, gpt, "veripo", part))
    run.start.load_state_dict(run.drift.weights[2])
    for part in (2, 3):
        gpt.load_state_dict(run.drift.weights[part])
        gpt.zero_grad()
        rows = [row_of(run, gpt, run.layers[0], i) for i in range(24)]
        losses = []
        for w in rows:
            for loser in rows:
                if w.question % 2 != part - 2 or w.question != loser.question:
                    continue
                sound = lambda r: r.text != RIGHT_TOO[2] and "</think>" in r.text
                if w.right and sound(w) and formed(w) and not (loser.right and sound(loser)):
                    x = (w.lp - w.start).sum() - (loser.lp - loser.start).sum()
                    losses.append(-torch.nn.functional.logsigmoid(0.1 * x))
        (sum(losses) / len(losses)).backward()
        close(run.drift.gradients[part], gradient(gpt))


def test_group_dro_weighs_kinds(gpt, encoding, monkeypatch):
    """Two kinds of questions: each one's advantages are multiplied by its weight times two."""
    other = PROBLEM._replace(question="x in {1, 2}, (x+3)*2 = 8 (mod 11)")
    monkeypatch.setattr(
        FixedTask, "train_problems", lambda self, *args: [PROBLEM, other, PROBLEM, other]
    )
    run = grown("group-dro", gpt, encoding, monkeypatch, (6,), minibatches=1)
    q = run.memory["q"]
    right = [
        [written(1, 6 * k + i).endswith("<answer>1 4 8</answer>") for i in range(6)]
        for k in range(4)
    ]
    wrong = {
        "2/3": 1 - statistics.mean(right[0] + right[2]),
        "2/2": 1 - statistics.mean(right[1] + right[3]),
    }
    raw = {k: math.exp(0.1 * x) for k, x in wrong.items()}
    expected = {k: x / sum(raw.values()) for k, x in raw.items()}
    assert q == pytest.approx(expected) and q["2/3"] != q["2/2"]

    def formula(run, rows):
        return [A * q["2/3" if rows[0].question % 2 == 0 else "2/2"] * 2 for A in grpo(run, rows)]

    monkeypatch.setitem(FORMULAS, "group-dro", formula)
    close(run.drift.gradients[0], by_formula(run, gpt, "group-dro", 0))


@pytest.mark.parametrize("name", METHODS)
def test_any_method_goes_with_any_number_of_layers(name, gpt, encoding, monkeypatch):
    """Three layers: the gradients of all optimiser steps are the same whether all rows are in one
    micro-batch or each in its own. Catches what a method counts or observes a micro-batch at a
    time, and a method that forgets the deeper layers."""
    start, found = copy.deepcopy(gpt.state_dict()), []
    for limit in (10**6, 1):
        gpt.load_state_dict(start)
        run = grown(
            name, gpt, encoding, monkeypatch, (3, 2, 2), minibatches=2,
            tokens_per_microbatch=limit,
        )  # fmt: skip
        found.append(run.drift.gradients)
    # (With guided error correction one of the two minibatches has no signal.)
    steps = dict(veripo=4).get(name, 1 if name == "edge-gec" else 2)
    assert len(run.layers) == 3 and len(found[0]) == len(found[1]) == steps
    for whole, parts in zip(*found):
        close(parts, whole)
    trained = [bool(layer.active(0).any()) for layer in run.layers]
    assert trained == [name != "igrpo", True, True]
