"""How fast a training step is: by phases, trees beside padded rows, how it grows, and beside TRL.

    python -m tools.bench_training                       # TRL's part: requirements-extra.txt
    python -m tools.bench_training --shape 0.5b --prompts 8 --group-sizes 8,4 --prompt-tokens 256 \\
        --new-tokens 512 --tokens-per-microbatch 32768   # on a GPU

The idea. The floor of a step is the arithmetic that nobody can leave out, at the measured speed of
a large matrix product:

    6 x parameters x tokens of the tree + 12 x N C L x (pairs of a token and one that it sees)

Every token counts once, whoever shares it. What padded rows compute again counts as time and not as
work. Rows end at lengths drawn evenly from 1 to --new-tokens; against TRL all have the full length.
Every row has an advantage, so that none is left out (in a real run many have none).

Letters: N query heads, C head size, L blocks.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import contextlib
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Annotated

import torch

import train
from engine import packing, threads
from engine.workers import in_parallel
from mgrpo import MGRPO, Layer, loss_inputs, policy_loss
from reward import score
from runtime import memory
from runtime.flags import AtLeast, guarded, parse_flags
from sample import Sampler
from tasks.tokenizer import build_encoding
from tools import machine
from tools.machine import Load, Measuring, type_name

KINDS = ("padded rows", "sorted rows", "tree")
PHRASE = [7] * 10  # tokens of a guiding phrase
ALL = 10**12  # tokens of a micro-batch that holds everything


@dataclass(frozen=True)
class Config:
    # g_1,g_2,...: completions of each prompt in a layer, as in train.py
    group_sizes: Annotated[tuple[int, ...], AtLeast(1)] = (8, 4)
    # tokens that go through the model together
    tokens_per_microbatch: Annotated[int, AtLeast(1)] = 16_384

    load: Load = Load()
    measuring: Measuring = Measuring()

    @property
    def rows(self):
        """[rows of layer 1, of layer 2, ...]"""
        return [
            self.load.prompts * math.prod(self.group_sizes[:k])
            for k in range(1, len(self.group_sizes) + 1)
        ]


# ---- a training step -----------------------------------------------------------------------------


class Clock(dict):
    """Seconds of each phase of a step. On CUDA the host waits for the device at both ends."""

    def __init__(self, device, layers):
        sampling = [f"sample {k}" for k in range(1, layers + 1)]
        phases = [*sampling, "reward", "gradient", "optimiser", "refresh"]
        super().__init__(dict.fromkeys(phases, 0.0))
        self.device = device

    @contextlib.contextmanager
    def phase(self, name):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self[name] += time.perf_counter() - start

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


class Bench:
    """A model with its sampler and optimiser, and prompts. ragged: rows end at random lengths."""

    def __init__(self, config, dtype, device, ragged=True):
        self.config, self.dtype, self.device = config, dtype, device
        load, layers = config.load, len(config.group_sizes)
        generator = torch.Generator().manual_seed(0)
        size = load.prompts, load.prompt_tokens
        self.prompts = torch.randint(0, 256, size, generator=generator).tolist()
        self.limits = []  # tokens of each row, layer by layer
        for rows in config.rows:
            lengths = torch.full((rows,), load.new_tokens)
            if ragged:
                lengths = torch.randint(1, load.new_tokens + 1, (rows,), generator=generator)
            self.limits.append(lengths.tolist())

        longest = load.prompt_tokens + layers * load.new_tokens + (layers - 1) * len(PHRASE)
        self.model = machine.make_model(config.measuring.shape, dtype, device, longest)
        self.model.recompute = config.measuring.shape != "default"  # as train.py with --init
        self.sampler = in_parallel(Sampler(self.model))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-5, weight_decay=0.0, fused=True
        )
        self.settings = train.Config(
            group_sizes=config.group_sizes,
            layer_weights=(1.0,) * layers,
            max_new_tokens=load.new_tokens,
        )
        self.encoding = build_encoding()

    def clock(self):
        return Clock(self.device, len(self.config.group_sizes))

    def rollout(self, clock, seed=0):
        """-> [Layer, ...], each row with an advantage."""
        layers = []
        for number, (n, limits) in enumerate(zip(self.config.group_sizes, self.limits), 1):
            with clock.phase(f"sample {number}"):
                if number == 1:
                    completions = self.sampler.generate(self.prompts, n, limits, seed=seed)
                else:
                    above = layers[-1].completions
                    phrases = [PHRASE] * len(above)
                    completions = self.sampler.extend(above, phrases, n, limits, seed=seed)
            with clock.phase("reward"):
                # The shape's vocabulary may be larger than this encoding: tokens become bytes, so
                # that there is text to score.
                ids = [[token % 256 for token in row] for row in completions.ids]  # bytes
                texts = [self.encoding.decode(row) for row in ids]
                rewards = torch.tensor([score(text, "7").total for text in texts])
            generator = torch.Generator().manual_seed(seed)
            parents = completions.parents.cpu()
            layers.append(
                Layer(
                    number,
                    completions,
                    texts,
                    answers=[(text,) for text in texts],
                    rewards=rewards,
                    correct=rewards > 0,
                    undecided=torch.zeros(len(rewards), dtype=torch.bool),
                    questions=parents if number == 1 else layers[-1].questions[parents],
                    parents=parents,
                    advantages=torch.randn(len(rewards), generator=generator),
                    trained=torch.ones(len(rewards), dtype=torch.bool),
                )
            )
        return layers

    def learn(self, layers, kind, clock):
        """One optimiser step on all rows."""
        # As in train.py: on a CPU each thread computes a part of a small model's micro-batch.
        loss_of = lambda branches: (self.loss(branches, kind), None)
        with clock.phase("gradient"), threads.apart(self.model):
            for batch in microbatches(branches_of(layers), kind, self.config.tokens_per_microbatch):
                packing.backward(self.model, batch, loss_of, pack=lambda part, device: part)
        with clock.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.MAX_GRADIENT_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch, kind):
        """The part of the loss of these branches: train.py's for a tree."""
        denominators = dict(enumerate(self.config.rows, 1))
        if kind == "tree":
            rest = (denominators, MGRPO, 0.0, 0.0, self.settings, True)
            pack = packing.pack_trees(batch, self.device)
            return train.batch_loss(self.model, None, pack, *rest)[0]
        # Padded rows: each row repeats the prompt and all that is above it.
        prompts = [[t for _, tokens in branch.path[:-1] for t in tokens] for branch in batch]
        sampled = [branch.sampled for branch in batch]
        rows = packing.pad_rows(prompts, sampled, self.device)
        logp, _ = packing.padded_logprobs(self.model, rows)  # [B, T]
        losses = []
        for layer, places, numbers in packing.rows_by_layer(batch, self.device):
            old_logp, advantages, mask, _ = loss_inputs(layer, numbers)
            loss, _ = policy_loss(
                logp[places, : mask.shape[1]],
                old_logp,
                advantages,
                mask,
                denominator=denominators[layer.number],
            )
            losses.append(loss)
        return sum(losses)

    def step(self, kind="tree", seed=0):
        """A whole step -> Clock."""
        clock = self.clock()
        self.learn(self.rollout(clock, seed), kind, clock)
        with clock.phase("refresh"):
            self.sampler.refresh()
        return clock


# ---- micro-batches and their work ----------------------------------------------------------------


def branches_of(layers):
    return [
        packing.branch_of(layers, layer.number, row)
        for layer in layers
        for row in range(len(layer.advantages))
    ]


def row_length(branch):
    """Tokens of the row that go through the model."""
    return sum(len(tokens) for _, tokens in branch.path)


def microbatches(branches, kind, limit):
    """Branches -> lists of branches of at most `limit` tokens, padding included.

    "padded rows": as they come, as many at a time as fit if each were the longest of all. "sorted
    rows": longest beside longest.
    """
    if kind == "tree":
        return packing.microbatches(branches, limit)
    if kind == "padded rows":
        at_once = max(1, limit // max(map(row_length, branches)))
        return [branches[i : i + at_once] for i in range(0, len(branches), at_once)]
    batches = []
    for branch in sorted(branches, key=row_length, reverse=True):
        # The first of a micro-batch is its longest.
        if not batches or row_length(batches[-1][0]) * (len(batches[-1]) + 1) > limit:
            batches.append([])
        batches[-1].append(branch)
    return batches


def padding(layers, kind, limit):
    """The share of the tokens that go through the model for nothing."""
    branches = branches_of(layers)
    batches = microbatches(branches, kind, limit)
    if kind == "tree":
        packs = [packing.pack_trees(batch) for batch in batches]
        return 1 - sum(p.real_tokens for p in packs) / sum(len(p.tokens) for p in packs)
    padded = sum(len(batch) * max(map(row_length, batch)) for batch in batches)
    return 1 - sum(map(row_length, branches)) / padded


def train_work(m, layers):
    """-> FLOPs of a forward and a backward pass over the tree, its tokens. m: ModelConfig."""
    (batch,) = packing.microbatches(branches_of(layers), ALL)
    pack = packing.pack_trees(batch)
    # The token at position p sees p + 1 tokens, itself included.
    pairs = int((pack.positions[: pack.real_tokens] + 1).sum())
    flops = 6 * memory.parameters(m) * pack.real_tokens
    return flops + 12 * m.heads * m.head_size * m.depth * pairs, pack.real_tokens


# ---- tables --------------------------------------------------------------------------------------


def print_phases(config, device, types):
    """Seconds of each phase of a step, for each way to cut rows into micro-batches."""
    load, measuring = config.load, config.measuring
    groups = ",".join(map(str, config.group_sizes))
    print(
        f"{load.prompts} questions, group sizes {groups}, prompts of {load.prompt_tokens} tokens, "
        f"rows of 1 to {load.new_tokens}, shape {measuring.shape}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; seconds, medians of {measuring.rounds} rounds in turns"
    )
    benches = {dtype: Bench(config, dtype, device) for dtype in types}
    clocks = {key: [] for key in itertools.product(types, KINDS)}
    # In turns, so that a machine that is slow for a while is slow for all.
    for number in range(measuring.rounds + 1):
        for dtype, kind in clocks:
            clock = benches[dtype].step(kind)
            if number:  # the first of each warms up
                clocks[dtype, kind].append(clock)

    names = list(benches[types[0]].clock())
    titles = "".join(f"{name:>11}" for name in names)
    print(f"{'':24}{titles}{'step':>9}{'tokens/s':>10}{'of floor':>10}{'padding':>9}")
    for (dtype, kind), found in clocks.items():
        bench = benches[dtype]
        layers = bench.rollout(bench.clock())
        flops, _ = train_work(bench.model.config, layers)
        peak, _ = machine.limits_of_machine(dtype, device)
        middle = {name: statistics.median(clock[name] for clock in found) for name in names}
        seconds = sum(middle.values())
        sampled = sum(map(sum, bench.limits))
        cells = "".join(f"{middle[name]:11.3f}" for name in names)
        print(
            f"{f'{kind}, {type_name(dtype)}':24}{cells}{seconds:9.3f}{sampled / seconds:10,.0f}"
            f"{flops / peak / middle['gradient']:10.1%}"
            f"{padding(layers, kind, config.tokens_per_microbatch):9.1%}"
        )
    for dtype in types:
        took = {kind: [clock["gradient"] for clock in clocks[dtype, kind]] for kind in KINDS}
        padded, ordered = (machine.median_ratio(took[kind], took["tree"]) for kind in KINDS[:2])
        print(
            f"{type_name(dtype)}: forward and backward of the tree are {padded:.2f} times as fast "
            f"as of padded rows, {ordered:.2f} times as of sorted ones"
        )
    print(f"memory, at most: {memory.peak(device) / memory.GB:.1f} GB")
    for dtype in types:
        print_floors(benches[dtype], clocks[dtype, "tree"])


def print_floors(bench, clocks):
    """Each phase of a step with trees: tokens per second (sampled ones, or the tree's), and the
    share of the floor."""
    config, m, dtype = bench.config, bench.model.config, bench.dtype
    peak, bandwidth = machine.limits_of_machine(dtype, bench.device)
    layers = bench.rollout(bench.clock())
    flops, tree = train_work(m, layers)
    parameters, sampled = memory.parameters(m), [sum(limits) for limits in bench.limits]
    # Sampling: tools/machine.py counts what each layer must read and compute.
    floors, tokens, above = {}, {}, config.load.prompt_tokens
    for number, (n, limits) in enumerate(zip(config.group_sizes, bench.limits), 1):
        volume, operations = machine.decode_work(m, dtype, above, n, limits)
        floors[f"sample {number}"] = max(volume / bandwidth, operations / peak)
        tokens[f"sample {number}"] = sum(limits)
        above += sum(limits) // len(limits) + len(
            PHRASE
        )  # what the next layer continues, on average
    floors |= dict(
        gradient=flops / peak,
        # Bytes: AdamW reads weight, gradient and two moments, and writes three of them, in fp32.
        optimiser=28 * parameters / bandwidth,
        refresh=(4 + dtype.itemsize) * parameters / bandwidth,
    )
    tokens |= dict(reward=sum(sampled), gradient=tree)
    print(f"\n{f'tree, {type_name(dtype)}':20}{'seconds':>9}{'tokens/s':>12}{'of floor':>10}")
    for name in clocks[0]:
        seconds = statistics.median(clock[name] for clock in clocks)
        rate = f"{tokens[name] / seconds:,.0f}" if name in tokens else "-"
        share = f"{floors[name] / seconds:.1%}" if name in floors else "-"
        print(f"{name:20}{seconds:9.3f}{rate:>12}{share:>10}")


def print_growth(config, device, dtype):
    """Seconds of forward and backward of the tree while one number grows, and the exponent of a
    power law through them."""
    print(
        f"\nforward and backward of the tree, {type_name(dtype)}; one number grows, the others "
        "stay; exponent of a power law"
    )
    sizes = (4, *[2] * (len(config.group_sizes) - 1))
    prompts = max(2, config.load.prompts // 4)
    tokens = max(2, config.load.new_tokens // 2)
    variants = {
        f"g_{k + 1}": [
            (g, (*sizes[:k], g, *sizes[k + 1 :]), tokens) for g in (size, 2 * size, 4 * size)
        ]
        for k, size in enumerate(sizes)
    }
    variants["tokens"] = [(factor * tokens, sizes, factor * tokens) for factor in (1, 2, 4)]
    for name, cases in variants.items():
        values, took = [value for value, *_ in cases], []
        for _, group_sizes, new_tokens in cases:
            load = dataclasses.replace(config.load, prompts=prompts, new_tokens=new_tokens)
            smaller = dataclasses.replace(config, load=load, group_sizes=group_sizes)
            bench, clocks = Bench(smaller, dtype, device, ragged=False), []
            layers = bench.rollout(bench.clock())
            for _ in range(config.measuring.rounds + 1):
                clocks.append(bench.clock())
                bench.learn(layers, "tree", clocks[-1])
            took.append(statistics.median(clock["gradient"] for clock in clocks[1:]))
        # time = c x value^exponent is a straight line in logarithms: its slope is the exponent.
        logs = [math.log(v) for v in values], [math.log(t) for t in took]
        exponent = statistics.linear_regression(*logs).slope
        cells = "".join(f"{v:6}: {seconds:7.3f} s" for v, seconds in zip(values, took))
        print(f"  {name:8}{cells}   exponent {exponent:.2f}")


# ---- TRL -----------------------------------------------------------------------------------------


def print_trl(config, device, types):
    """A step of layer 1 alone, all rows of full length, by train.py's parts and by TRL.

    Ours runs in the callback that ends TRL's step: only one of them computes at a time.
    """
    if not machine.installed("trl"):
        return
    import trl

    config = dataclasses.replace(config, group_sizes=config.group_sizes[:1])
    seconds = {name: {dtype: [] for dtype in types} for name in ("ours", f"TRL {trl.__version__}")}
    ours, theirs = seconds.values()
    for dtype in types:
        bench = Bench(config, dtype, device, ragged=False)

        def our_step(bench=bench, dtype=dtype):
            ours[dtype].append(machine.timed(bench.step, device))

        trl_steps(config, dtype, device, our_step, theirs[dtype])
    load = config.load
    print(
        f"\nlayer 1 alone: {load.prompts} questions x {config.group_sizes[0]} completions of "
        f"{load.new_tokens} tokens, prompts of {load.prompt_tokens}; seconds"
    )
    best = {}
    for name, found in seconds.items():
        middle = {dtype: statistics.median(found[dtype][1:]) for dtype in types}
        best[name] = min(middle.values())
        for dtype in types:
            print(f"{name:14}{type_name(dtype):10}{middle[dtype]:8.3f}")
    ratio = best["ours"] / best[f"TRL {trl.__version__}"]
    print(f"ours takes {ratio:.2f} of TRL's step time, each in its faster type")


def trl_steps(config, dtype, device, between, seconds):
    """Runs GRPOTrainer for --rounds + 1 steps on a model of our shape. Calls between() after each
    step, and appends the seconds of each to `seconds`."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that TRL uses
    load, (rows,) = config.load, config.rows
    model = machine.their_model(config.measuring.shape, torch.float32, device)
    # TRL starts from texts. Here a word is a token, so that prompts have exactly the wanted length.
    vocabulary = {f"w{i}": i for i in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1"
    )
    size = 4 * load.prompts, load.prompt_tokens
    prompts = torch.randint(2, 256, size, generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]

    class Between(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            between()

    with tempfile.TemporaryDirectory() as folder:
        micro = min(32, rows)
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=rows // micro,
                num_generations=config.group_sizes[0],
                max_completion_length=load.new_tokens,
                max_steps=config.measuring.rounds + 1,
                learning_rate=1e-5,
                gradient_checkpointing=False,
                bf16=dtype == torch.bfloat16,
                use_cpu=device == "cpu",
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            processing_class=tokenizer,
            callbacks=[Between()],
            reward_funcs=lambda completion_ids, **_: [
                sum(i % 2 for i in ids) / len(ids) for ids in completion_ids
            ],
            train_dataset=Dataset.from_dict(dict(prompt=texts)),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        # Without an end token every completion has its full length.
        generation = trainer.generation_config, trainer.model.generation_config
        # In every place where TRL or transformers may look for it.
        for settings in (*generation, trainer.model.config):
            settings.eos_token_id = None
        trainer.eos_token_ids = [-1]
        trainer.train()


RENAMED = machine.RENAMED | dict(
    group="the first number of --group-sizes", corrections="the second number of --group-sizes"
)


def main():
    """Prints all tables: phases, floors, growth, and TRL's step beside ours."""
    config = parse_flags(Config, __doc__, renamed=RENAMED)
    device = machine.prepare(config.measuring)
    types = machine.types_on(device)
    print_phases(config, device, types)
    print_growth(config, device, types[-1])
    print_trl(config, device, types)


if __name__ == "__main__":
    guarded(main)
