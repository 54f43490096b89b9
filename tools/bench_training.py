"""How fast a training step is: by phases, trees beside padded rows, how the cost grows, and TRL's
GRPOTrainer in the same run.

    python bench.py train                                              # on a CPU; TRL's part needs:
                                                                       pip install -r
                                                                       requirements-extra.txt
    python bench.py train --shape 0.5b --rows 64 --corrections 4 --prompt 256 --new 512 --tokens-per-microbatch 32768      # on a GPU

The idea. The floor of a step is the arithmetic that nobody can leave out, at the speed of a large
matrix product measured here and now:

    6 x parameters x tokens of the tree + 12 x heads x head size x layers x (pairs of a token and
    one that it sees)

once for each token, whoever shares it (the few that predict nothing count with the vocabulary all
the same). What padded rows compute again counts as time and not as work. Rows end at lengths drawn
evenly from 1 to --new; against TRL all have the full length. Every row has an advantage, so that
nothing is left out.
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
import types
import warnings

import torch

import train
from engine.packing import leaf, pack, row_packs, tree_packs
from mgrpo import Layer
from reward import score
from runtime import memory
from runtime.device import pick_device
from sample import Sampler
from tasks.tokenizer import build_encoding
from tools import bench

PHASES = ("sample 1", "sample 2", "reward", "forward", "backward", "optimiser", "refresh")
KINDS = ("padded rows", "sorted rows", "tree")
PHRASE = [7] * 10  # tokens of a guiding phrase


class Clock(dict):
    """Seconds of each phase of a step; on CUDA the device is waited for at both ends."""

    def __init__(self, device):
        super().__init__(dict.fromkeys(PHASES, 0.0))
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
    """A model with its sampler and optimiser, and questions; `c`: bench.Config."""

    def __init__(self, c, dtype, device, layers=2, ragged=True):
        self.c, self.device, self.layers = c, device, layers
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(
            0, 256, (c.rows // c.group, c.prompt), generator=generator
        ).tolist()
        count = [c.rows, c.rows * c.corrections]
        length = lambda n: (
            torch.randint(1, c.new + 1, (n,), generator=generator)
            if ragged
            else torch.full((n,), c.new)
        )
        self.limits = [length(n).tolist() for n in count]
        self.model = bench.make_model(c, dtype, device, context=c.prompt + 2 * c.new + len(PHRASE))
        self.model.recompute = c.shape != "default"
        self.sampler = Sampler(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-5, weight_decay=0.0, fused=True
        )
        self.settings = train.Config(
            tokens_per_microbatch=c.tokens_per_microbatch, max_new_tokens=c.new
        )
        self.encoding = build_encoding()

    def rollout(self, clock, seed=0):
        """-> [Layer, ...], each row with an advantage."""
        with clock.phase("sample 1"):
            grown = [self.sampler.generate(self.prompts, self.c.group, self.limits[0], seed=seed)]
        if self.layers == 2:
            with clock.phase("sample 2"):
                grown.append(
                    self.sampler.extend(
                        grown[0],
                        [PHRASE] * len(grown[0]),
                        self.c.corrections,
                        self.limits[1],
                        seed=seed,
                    )
                )
        found = []
        for completions in grown:
            with clock.phase("reward"):
                texts = self.encoding.decode_batch(
                    [[token % 256 for token in ids] for ids in completions.ids]
                )
                rewards = torch.tensor([score(text, "7").total for text in texts])
            advantages = torch.randn(len(rewards), generator=torch.Generator().manual_seed(seed))
            found.append(
                Layer(
                    completions,
                    texts,
                    rewards,
                    rewards > 0,
                    completions.parents.cpu(),
                    completions.parents.cpu(),
                    advantages=advantages,
                    trained=torch.ones_like(rewards, dtype=torch.bool),
                )
            )
        return found

    def learn(self, layers, kind, clock):
        """One optimiser step on all rows."""
        leaves = all_leaves(layers)
        c = types.SimpleNamespace(
            **vars(self.settings) | dict(pack="tree" if kind == "tree" else "rows")
        )
        for some in cut(leaves, kind, c.tokens_per_microbatch):
            with clock.phase("forward"):
                loss, _ = train.loss_of(
                    self.model, None, some, {1: self.c.rows, 2: self.c.rows * self.c.corrections}, c
                )
            with clock.phase("backward"):
                loss.backward()
        with clock.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, kind="tree", seed=0):
        """A whole step -> Clock."""
        clock = Clock(self.device)
        self.learn(self.rollout(clock, seed), kind, clock)
        with clock.phase("refresh"):
            self.sampler.refresh()
        return clock


def cut(leaves, kind, most):
    """Leaves -> micro-batches. Padded rows are taken as they come, all as long as the longest of
    all."""
    if kind == "tree":
        return tree_packs(leaves, most)
    if kind == "sorted rows":
        return row_packs(leaves, most)
    longest = max(sum(len(tokens) for _, tokens in one.path) for one in leaves)
    at_once = max(1, most // longest)
    return [leaves[i : i + at_once] for i in range(0, len(leaves), at_once)]


def work(config, layers):
    """FLOPs of a forward and backward pass over the tree."""
    leaves = all_leaves(layers)
    forest = pack(tree_packs(leaves, 10**12)[0], multiple=1)
    seen = int((forest.positions[: forest.needed] + 1).sum())
    return (
        6 * memory.parameters(config) * forest.needed
        + 12 * config.heads * config.head_size * config.depth * seen
    )


# ---- tables --------------------------------------------------------------------------------------


def phases(c, device, types_):
    """Seconds of each phase, of a whole step with trees; and forward and backward with each way to
    cut rows, in one run."""
    print(
        f"{c.rows // c.group} questions, G = {c.group}, H = {c.corrections}, prompts of {c.prompt} "
        f"tokens, rows of 1 to {c.new}, shape "
        f"{c.shape}; torch {torch.__version__}, {torch.get_num_threads()} threads; seconds, "
        f"medians of {c.rounds} rounds in turns"
    )
    print(
        f"{'':24}"
        + "".join(f"{name:>11}" for name in PHASES)
        + f"{'step':>9}{'tokens/s':>10}{'of floor':>10}{'padding':>9}"
    )
    benches = {dtype: Bench(c, dtype, device) for dtype in types_}
    clocks = {key: [] for key in itertools.product(types_, KINDS)}
    for number in range(c.rounds + 1):
        for dtype, kind in clocks:
            clock = benches[dtype].step(kind)
            if number:  # the first of each warms up
                clocks[dtype, kind].append(clock)
    for (dtype, kind), found in clocks.items():
        layers = benches[dtype].rollout(Clock(device))
        flops = work(benches[dtype].model.config, layers)
        peak, _ = bench.limits_of_machine(dtype, device)
        middle = {name: statistics.median(clock[name] for clock in found) for name in PHASES}
        new, whole, training = (
            sum(map(sum, benches[dtype].limits)),
            sum(middle.values()),
            middle["forward"] + middle["backward"],
        )
        print(
            f"{kind + ', ' + str(dtype)[6:]:24}"
            + "".join(f"{middle[name]:11.3f}" for name in PHASES)
            + f"{whole:9.3f}{new / whole:10,.0f}{flops / peak / training:10.1%}{padding(layers, kind, c):9.1%}"
        )
    for dtype in types_:
        took = {
            kind: [clock["forward"] + clock["backward"] for clock in clocks[dtype, kind]]
            for kind in KINDS
        }
        ratios = {
            kind: statistics.median(a / b for a, b in zip(took[kind], took["tree"]))
            for kind in KINDS[:2]
        }
        print(
            f"{str(dtype)[6:]}: forward and backward of the tree are {ratios['padded rows']:.2f} "
            "times as fast as of padded rows, "
            f"{ratios['sorted rows']:.2f} times as of sorted ones"
        )
    print(f"memory, at most: {memory.peak(device) / memory.GB:.1f} GB")
    for dtype in types_:
        phase_by_phase(benches[dtype], clocks[dtype, "tree"], dtype)


def phase_by_phase(one, clocks, dtype):
    """Of a step with trees: each phase's tokens a second (sampled ones, or the tree's) and the
    share of its own floor."""
    layers, c, m = one.rollout(Clock(one.device)), one.c, one.model.config
    peak, bandwidth = bench.limits_of_machine(dtype, one.device)
    numbers, sampled = memory.parameters(m), [sum(limits) for limits in one.limits]
    # what a correction goes on from, on average
    grown = sum(one.limits[0]) // len(one.limits[0]) + c.prompt + len(PHRASE)
    volumes = [
        bench.work(m, dtype, size, limits)
        for size, limits in zip(
            (c, dataclasses.replace(c, prompt=grown, group=c.corrections)), one.limits
        )
    ]
    flops, tree = work(m, layers), pack(tree_packs(all_leaves(layers), 10**12)[0]).needed
    floors = {
        name: max(volume / bandwidth, some / peak) for name, (volume, some) in zip(PHASES, volumes)
    }
    floors |= dict(
        forward=flops / 3 / peak,
        backward=2 * flops / 3 / peak,
        optimiser=28 * numbers / bandwidth,
        refresh=(4 + dtype.itemsize) * numbers / bandwidth,
    )
    tokens = dict(zip(PHASES, sampled)) | dict(reward=sum(sampled), forward=tree, backward=tree)
    print(f"\ntree, {str(dtype)[6:]:14}{'seconds':>9}{'tokens/s':>12}{'of floor':>10}")
    for name in PHASES:
        seconds = statistics.median(clock[name] for clock in clocks)
        rate = f"{tokens[name] / seconds:,.0f}" if name in tokens else "-"
        print(
            f"{name:20}{seconds:9.3f}{rate:>12}"
            + (f"{floors[name] / seconds:10.1%}" if name in floors else f"{'-':>10}")
        )


def all_leaves(layers):
    return [
        leaf(layers, depth, row)
        for depth, layer in enumerate(layers, 1)
        for row in range(len(layer.advantages))
    ]


def padding(layers, kind, c):
    """Share of the tokens that go through the model and are nobody's."""
    leaves = all_leaves(layers)
    length = lambda one: sum(len(tokens) for _, tokens in one.path)
    if kind == "tree":
        forests = [pack(some) for some in tree_packs(leaves, c.tokens_per_microbatch)]
        return 1 - sum(forest.needed for forest in forests) / sum(
            len(forest.tokens) for forest in forests
        )
    batches = cut(leaves, kind, c.tokens_per_microbatch)
    return 1 - sum(map(length, leaves)) / sum(
        len(some) * max(map(length, some)) for some in batches
    )


def growth(c, device, dtype):
    """Seconds of forward and backward of the tree over G, H and length, each alone, and the
    exponent of a power law through them."""
    print(
        f"\nforward and backward of the tree, {str(dtype)[6:]}; one number grows, the others stay; "
        "exponent of a power law"
    )
    start = dict(group=4, corrections=2, new=max(2, c.new // 2))
    for name in start:
        values, took = [start[name] * factor for factor in (1, 2, 4)], []
        for value in values:
            settings = start | {name: value}
            size = dataclasses.replace(c, **settings, rows=max(2, c.rows // 32) * settings["group"])
            one, clocks = Bench(size, dtype, device, ragged=False), []
            layers = one.rollout(Clock(device))
            for _ in range(c.rounds + 1):
                clocks.append(Clock(device))
                one.learn(layers, "tree", clocks[-1])
            took.append(
                statistics.median(clock["forward"] + clock["backward"] for clock in clocks[1:])
            )
        exponent = statistics.linear_regression(
            [math.log(v) for v in values], [math.log(t) for t in took]
        ).slope
        title = dict(group="G", corrections="H", new="tokens")[name]
        print(
            f"  {title:8}"
            + "".join(f"{v:6}: {seconds:7.3f} s" for v, seconds in zip(values, took))
            + f"   exponent {exponent:.2f}"
        )


# ---- TRL -----------------------------------------------------------------------------------------


def against_trl(c, device, types_):
    """A step of layer 1 alone, all rows of full length. Ours runs in the callback that ends TRL's:
    only one of them computes at a time."""
    try:
        import trl
    except ImportError:
        print("\ntrl is not installed (pip install -r requirements-extra.txt)")
        return
    ours, theirs = {dtype: [] for dtype in types_}, {dtype: [] for dtype in types_}
    for dtype in types_:
        one = Bench(c, dtype, device, layers=1, ragged=False)
        trl_steps(
            c,
            dtype,
            device,
            lambda one=one, dtype=dtype: ours[dtype].append(bench.timed(one.step, device)),
            theirs[dtype],
        )
    print(
        f"\nlayer 1 alone: {c.rows // c.group} questions x {c.group} completions of {c.new} "
        f"tokens, prompts of {c.prompt}; seconds"
    )
    middle = {
        (name, dtype): statistics.median(found[dtype][1:])
        for name, found in (("ours", ours), (f"TRL {trl.__version__}", theirs))
        for dtype in types_
    }
    for (name, dtype), seconds in middle.items():
        print(f"{name:14}{str(dtype)[6:]:10}{seconds:8.3f}")
    best = {
        name: min(seconds for (other, _), seconds in middle.items() if other == name)
        for name, _ in middle
    }
    print(
        f"ours takes {best['ours'] / best[f'TRL {trl.__version__}']:.2f} of TRL's step time, each "
        "in its faster type"
    )


def trl_steps(c, dtype, device, between, seconds):
    """Runs GRPOTrainer for --rounds + 1 steps on a model of our shape, calls between() after each,
    and notes the seconds of each."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that TRL uses
    model = bench.their_model(c, torch.float32, device)
    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1"
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 256, (4 * c.rows // c.group, c.prompt), generator=generator).tolist()

    class Between(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            between()

    with tempfile.TemporaryDirectory() as folder:
        micro = min(32, c.rows)
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=c.rows // micro,
            num_generations=c.group,
            max_completion_length=c.new,
            max_steps=c.rounds + 1,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_cpu=device == "cpu",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=model,
            args=settings,
            processing_class=tokenizer,
            callbacks=[Between()],
            reward_funcs=lambda completion_ids, **_: [
                sum(i % 2 for i in ids) / len(ids) for ids in completion_ids
            ],
            train_dataset=Dataset.from_dict(
                {"prompt": [" ".join(f"w{i}" for i in prompt) for prompt in prompts]}
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        for settings in (
            trainer.generation_config,
            trainer.model.generation_config,
            trainer.model.config,
        ):
            settings.eos_token_id = None  # every completion has its full length
        trainer.eos_token_ids = [-1]
        trainer.train()


def bench_all(c):
    """Every table."""
    device = pick_device(c.device)
    torch.set_num_threads(c.threads or torch.get_num_threads())
    types_ = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    phases(c, device, types_)
    growth(c, device, types_[-1])
    against_trl(c, device, types_)
