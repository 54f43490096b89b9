"""What a method looks at besides the rollout, and the reference that follows the policy.

Nearly every method needs only rewards and tokens. Some ask for more: entropies, vectors,
log-probabilities under the policy of this moment or under the reference. `observe` finds these for
all sampled tokens, in passes without gradient over the same packed trees that training uses. It
generates no tokens, and costs about a third of the training pass.
"""

import dataclasses

import torch
from torch.nn.utils.rnn import pad_sequence

from engine import packing, threads
from reward import extract_answer, score
from runtime import distributed


def observe(model, layers, rows, names, config):
    """Fills layer.observed[name] of some rows, [B, T] or [B, T, D], zeros elsewhere.

    rows: [(Layer, row numbers), ...]. names: "logp", "entropy" or "hidden", each with a prefix that
    says when or under which model: "new_logp". All ranks must call, with the same names.
    """
    branches = [
        packing.branch_of(layers, layer.number, row)
        for layer, some in rows
        for row in some.tolist()
    ]
    batches = packing.microbatches(branches, config.hardware.tokens_per_microbatch)
    passes = int(distributed.max_over_ranks(len(batches)))
    kinds = {name.rpartition("_")[2] for name in names}

    def look(part):
        pack = packing.pack_trees(part, model.cos.device)
        with torch.no_grad():
            columns = packing.tree_columns(model, pack, config.temperature, kinds)
        return pack.layers, {kind: column.float().cpu() for kind, column in columns.items()}

    parts = [part for batch in batches for part in packing.whole_trees(batch, threads.count)]
    parts += [[]] * (passes - len(batches))  # (of several ranks each has one part a pass)
    for rows_of_part, columns in threads.run(look, parts):
        for layer, places, numbers in rows_of_part:
            t = layer.mask.shape[1]
            for name in names:
                column = columns[name.rpartition("_")[2]][places.cpu(), :t]
                if name not in layer.observed:
                    shape = (len(layer.rewards), t, *column.shape[2:])
                    layer.observed[name] = torch.zeros(shape)
                layer.observed[name][numbers, : column.shape[1]] = column
    distributed.release(model)


def observe_all(policy, reference, layers, method, config):
    """What a method asks for, of all rows, under the policy and under the reference."""
    rows = [(layer, torch.arange(len(layer.rewards))) for layer in layers]
    names = [*method.observe, *["new_logp"] * method.fresh]
    for model, prefixed in ((policy, False), (reference, True)):
        wanted = [name for name in names if name.startswith("ref_") == prefixed and name != "head"]
        if wanted:
            observe(model, layers, rows, wanted, config)
    if "head" in names:  # a collective: once, however many layers this rank has
        head = whole_head(policy) / config.temperature
        for layer in layers:
            layer.observed["head"] = head


def rewritten(policy, layers, method, task, config, seed):
    """The layers, with answers of layer 1 replaced as the method says, by text that nobody sampled.

    They are scored like answers. Their log π_old is the policy's own, so their ratio is 1 before
    the first update. They count neither as generated tokens nor in the log's accuracies.
    """
    if method.rewrite is None:
        return layers
    first, c = layers[0], layers[0].completions
    texts = method.rewrite(first, seed)
    rows = [
        [*task.encoding.encode_ordinary(texts[i]), policy.config.end_tokens[0]] if i in texts else x
        for i, x in enumerate(c.sampled)
    ]
    given = torch.tensor([i in texts for i in range(len(rows))])
    wider = max(map(len, rows)) - c.logprobs.shape[1]
    anchored = dataclasses.replace(
        c,
        tokens=pad_sequence([torch.tensor(row) for row in rows], True).to(c.tokens.device),
        logprobs=torch.nn.functional.pad(c.logprobs, (0, max(wider, 0))),
        lengths=torch.tensor([len(row) for row in rows]).to(c.lengths.device),
        ended=c.ended | given.to(c.ended.device),
    )
    said = [texts.get(i, text) for i, text in enumerate(first.texts)]
    scores = [
        score(text, problem.gold, config.format_weight, task.verifier)
        for text, problem in zip(said, first.problems)
    ]
    layer = dataclasses.replace(
        first,
        completions=anchored,
        texts=said,
        answers=[(extract_answer(text),) for text in said],
        rewards=torch.tensor([s.total for s in scores]),
        correct=torch.tensor([s.accuracy == 1 for s in scores]),
        undecided=torch.tensor([s.failed == 1 for s in scores]),
        given=given,
        sampled_correct=first.correct,
    )
    layers = [layer, *layers[1:]]
    numbers = given.nonzero()[:, 0]
    observe(policy, layers, [(layer, numbers)], ["own_logp"], config)
    if len(numbers):
        own = layer.observed["own_logp"][numbers].to(anchored.logprobs.device)
        anchored.logprobs[numbers.to(own.device), : own.shape[1]] = own
    return layers


def whole_head(policy):
    """[V, D], the weights that turn vectors into logits; whole on every rank."""
    head = None
    # All ranks gather every tensor; only the head is kept.
    for parameter, tensor in zip(policy.parameters(), distributed.full_tensors(policy)):
        if parameter is policy.head.weight:
            head = tensor.float().cpu()
    return head


def leash(rows, method):
    """Weight of each token's log π_old - log π in the loss of an optimiser step; 0 without a
    constraint.

    The mean of that over the step's trained tokens, of all ranks, estimates KL(π_old || π), with
    the right gradient, because the tokens are π_old's. The constraint makes a weight of it, which
    is held fixed.
    """
    if method.constraint is None:
        return 0.0
    sums = dict(gap=0.0, tokens=0)
    for layer, numbers in rows:
        numbers = numbers[layer.trained[numbers]]
        # Of the trainer both: in bf16 the sampler's differ by more than the constraint allows.
        gap = layer.observed["logp"] - layer.observed["new_logp"]
        gap = gap[numbers] * layer.mask[numbers]
        sums["gap"] += float(gap.sum())
        sums["tokens"] += int(layer.lengths[numbers].sum())
    sums = distributed.sum_over_ranks(sums)
    tokens = max(sums["tokens"], 1)
    return method.constraint(sums["gap"] / tokens) / tokens


def follow(reference, policy, method, step):
    """The reference of a method with a `decay` moves towards the policy, every few steps."""
    if method.decay < 1 and step % method.follow_every == 0:
        with torch.no_grad():
            for slow, fast in zip(reference.parameters(), policy.parameters()):
                slow.lerp_(fast, 1 - method.decay)


def gathered(things):
    """A list of this rank -> that of all ranks, in their order."""
    return [thing for things in distributed.gather_objects(things) for thing in things]
