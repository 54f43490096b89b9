"""How fast the sampler is: built up from a naive one, and beside transformers' `generate`.

    python -m tools.bench_sampler                        # both tables
    python -m tools.bench_sampler --ladder none          # ours beside transformers alone
    python -m tools.bench_sampler --shape 0.5b --prompt-tokens 256 --new-tokens 512      # on a GPU

The idea. Two tables, with the floor of tools/machine.py beside every speed. The ladder adds one
idea a line to a naive sampler. Its rows end at lengths drawn evenly from 1 to --new-tokens, and
tokens count up to the end only. `generate` computes an ended row as long as any row is alive; so in
the second table all rows have the full length, and nothing is compared but the work of a step. Each
side runs in whichever of float32 and bfloat16 is faster for it.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import statistics
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from engine.workers import in_parallel
from runtime.flags import AtLeast, guarded, parse_flags
from sample import Sampler
from tools import machine
from tools.machine import Load, Measuring, type_name

NAIVE = "recompute everything"
# What each line switches on: arguments of Sampler, and processes (None: no cache at all).
LADDER = {
    NAIVE: None,
    "KV cache": dict(share=False, leave=False, fused=False, graph=False, workers=1),
    "+ shared prefix": dict(leave=False, fused=False, graph=False, workers=1),
    "+ ended rows leave": dict(fused=False, graph=False, workers=1),
    "+ a process on each core": dict(fused=False),
    "+ fused kernels": dict(fused=True, graph=False),
    "+ CUDA graph": dict(fused=True, graph=True),
}
CUDA_ONLY = "compiled, not run: needs CUDA"
ABSENT = {  # device -> {line that does not run there: why}
    "cpu": {"+ fused kernels": CUDA_ONLY, "+ CUDA graph": CUDA_ONLY},
    "cuda": {"+ a process on each core": "for CPUs"},
}


@dataclass(frozen=True)
class Config:
    # lines of the ladder; last: only the sampler as it is used
    ladder: Literal["all", "last", "none"] = "all"
    group_size: Annotated[int, AtLeast(1)] = 8  # completions of each prompt

    load: Load = Load()
    measuring: Measuring = Measuring()

    @property
    def rows(self):
        return self.load.prompts * self.group_size


# ---- what is measured ----------------------------------------------------------------------------


def make_model(config, dtype, device):
    context = config.load.prompt_tokens + config.load.new_tokens
    return machine.make_model(config.measuring.shape, dtype, device, context)


@torch.inference_mode()
def recompute(model, prompts, n, limits):
    """The naive sampler: every step runs every row through the model from its first token on."""
    # [B, T], a column longer with every step.
    tokens = torch.tensor(prompts, device=model.embed.weight.device).repeat_interleave(n, 0)
    for _ in range(max(limits)):
        logits = F.linear(model(tokens)[:, -1], model.head.weight.to(model.compute))
        tokens = torch.cat([tokens, logits.float().softmax(-1).multinomial(1)], 1)


def line_of_ladder(switches, model, n, prompts, limits):
    """-> function that samples all rows once. limits: tokens of each row."""
    if switches is None:
        return lambda: recompute(model, prompts, n, limits)
    workers = switches.get("workers")
    switches = {name: value for name, value in switches.items() if name != "workers"}
    sampler = in_parallel(Sampler(model, **switches), workers)
    return lambda: sampler.generate(prompts, n, limits, seed=0)


def theirs(dtype, config, prompts, device):
    """-> function that samples all rows once by transformers' generate with its default cache."""
    load, context = config.load, config.load.prompt_tokens + config.load.new_tokens
    model = machine.their_model(config.measuring.shape, dtype, device, context).eval()
    tokens = torch.tensor(prompts, device=device).repeat_interleave(config.group_size, 0)
    settings = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=load.new_tokens,
        min_new_tokens=load.new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )

    @torch.no_grad()
    def run():
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        assert found.shape[1] == context, f"{found.shape[1]} tokens a row, not {context}"

    return run


# ---- the tables ----------------------------------------------------------------------------------


def print_speeds(title, seconds, lengths, config, device):
    """A table with a line for each (name, type) of `seconds`, beside the floor in that type."""
    heads = f"{'tokens/s':>11}{'ms/step':>9}{'GB':>8}{'GFLOP':>9}{'floor ms':>10}{'of floor':>9}"
    print(f"\n{title}\n{'':38}{heads}")
    limits = {d: machine.limits_of_machine(d, device) for d in {dtype for _, dtype in seconds}}
    for (name, dtype), times in seconds.items():
        start = f"{name:28}{type_name(dtype):10}"
        if not times:
            why = ABSENT[device].get(name, "not run: only for --shape default")
            print(f"{start}{why:>40}")
            continue
        peak, bandwidth = limits[dtype]
        shape = machine.ModelConfig(**machine.SHAPES[config.measuring.shape])
        volume, flops = machine.decode_work(
            shape, dtype, config.load.prompt_tokens, config.group_size, lengths
        )
        # Bytes and arithmetic can overlap, so the larger of the two is the floor.
        floor, middle = max(volume / bandwidth, flops / peak), statistics.median(times)
        steps = max(lengths)
        print(
            f"{start}{sum(lengths) / middle:11,.0f}{middle / steps * 1e3:9.2f}"
            f"{volume / 1e9:8.2f}{flops / 1e9:9.1f}{floor / steps * 1e3:10.3f}"
            f"{floor / middle:9.1%}"
        )
    for dtype, (peak, bandwidth) in limits.items():
        print(machine.limits_text(dtype, peak, bandwidth))


def bench_ladder(config, types, device, prompts, lengths):
    """-> {(line, type): [seconds]}, empty where a line does not run."""
    variants, absent = {}, {}
    # The sampler as it is used on this device.
    last = [name for name in LADDER if name not in ABSENT[device]][-1]
    for dtype in types:
        model = make_model(config, dtype, device)
        for name in LADDER if config.ladder == "all" else [last]:
            switches = LADDER[name]
            naive_is_too_slow = switches is None and config.measuring.shape != "default"
            if name in ABSENT[device] or naive_is_too_slow:
                absent[name, dtype] = []
            else:
                variants[name, dtype] = line_of_ladder(
                    switches, model, config.group_size, prompts, lengths
                )
    naive = {key: variants.pop(key) for key in list(variants) if key[0] == NAIVE}
    once = {key: [machine.timed(run, device)] for key, run in naive.items()}  # it takes minutes
    return once | machine.in_turns(variants, config.measuring.rounds, device) | absent


def bench_peers(config, types, device, prompts):
    """Prints our sampler beside transformers', and the ratio of each side's faster type."""
    lengths = [config.load.new_tokens] * config.rows

    def ours(dtype):
        model = make_model(config, dtype, device)
        return line_of_ladder({}, model, config.group_size, prompts, lengths)

    makers = dict(ours=ours)
    if machine.installed("transformers"):
        import transformers

        peer = f"transformers {transformers.__version__}"
        makers[peer] = lambda dtype: theirs(dtype, config, prompts, device)
    variants = {(name, dtype): make(dtype) for name, make in makers.items() for dtype in types}
    seconds = machine.in_turns(variants, config.measuring.rounds, device)
    title = "Against transformers' generate: every row of full length"
    print_speeds(title, seconds, lengths, config, device)
    # Each side is shown in its faster type: a fixed one would favour the side that is tuned for it.
    best = {
        name: min(types, key=lambda dtype: statistics.median(seconds[name, dtype]))
        for name in makers
    }
    for name in list(makers)[1:]:
        ratio = machine.median_ratio(seconds[name, best[name]], seconds["ours", best["ours"]])
        ours_type, their_type = type_name(best["ours"]), type_name(best[name])
        print(f"ours ({ours_type}) is {ratio:.1f} times {name} ({their_type})")


def main():
    """Prints both tables: the ladder, and our sampler beside transformers'."""
    config = parse_flags(Config, __doc__, renamed=machine.RENAMED)
    device, load = machine.prepare(config.measuring), config.load
    types, generator = machine.types_on(device), torch.Generator().manual_seed(0)
    size = load.prompts, load.prompt_tokens
    prompts = torch.randint(0, 256, size, generator=generator).tolist()
    print(
        f"{config.rows} rows ({load.prompts} prompts x {config.group_size}), {load.prompt_tokens} "
        f"prompt + {load.new_tokens} new tokens, shape {config.measuring.shape}; "
        f"{machine.machine_name(device)}, torch {torch.__version__}; medians of "
        f"{config.measuring.rounds} rounds in turns"
    )
    if config.ladder != "none":
        lengths = torch.randint(1, load.new_tokens + 1, (config.rows,), generator=generator)
        lengths = lengths.tolist()
        seconds = bench_ladder(config, types, device, prompts, lengths)
        title = "The ladder: one idea more in each line; rows end at lengths from 1 to the longest"
        print_speeds(title, seconds, lengths, config, device)
    bench_peers(config, types, device, prompts)


if __name__ == "__main__":
    guarded(main)
