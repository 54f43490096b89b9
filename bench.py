"""Speeds, beside what the machine could do: sampling against transformers' `generate`, in one run.

    python bench.py sampler                      # our sampler; transformers too, where it is installed
    python bench.py sampler --rows 1024 --new 32

The idea. A speed alone says little: machines differ and other jobs interfere. So variants take turns within one run, medians are
quoted as ratios, each side runs in whichever of fp32 and bf16 is faster for it, and the floor stands beside: the time that the
matrix products alone would take at the speed measured for a large product. Work is fixed: no row ends early, all draw from the
full distribution at temperature 1.
"""
import gc
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from flags import BadInput, guarded, parse_flags
from model import GPT, ModelConfig
from sample import Sampler
from tokenizer import build_encoding


@dataclass(frozen=True)
class Config:
    what: Literal["sampler"] = "sampler"      # what to measure; may also be given as a bare first word
    rows: int = 256           # completions at a time
    group: int = 8            # completions per prompt
    prompt: int = 32          # tokens per prompt
    new: int = 64             # tokens per completion
    rounds: int = 5           # every variant is timed so many times, in turns; medians are shown
    threads: int = 0          # CPU threads; 0: all


def default_model(dtype):
    """The cpu preset's shape, with an end token that no row samples."""
    torch.manual_seed(0)
    return GPT(ModelConfig(build_encoding().n_vocab, qk_norm=True), dtype)


def ours(dtype, c, prompts):
    sampler = Sampler(default_model(dtype))
    return lambda: sampler.generate(prompts, c.group, c.new, seed=0)


def theirs(dtype, c, prompts):
    """transformers' generate with its default (dynamic) cache on a Qwen3 of the same shape, which is our default architecture."""
    import transformers
    transformers.logging.set_verbosity_error()
    m = default_model(dtype).config
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=m.vocab_size, hidden_size=m.width, num_hidden_layers=m.depth, num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads, head_dim=m.head_size, intermediate_size=m.hidden, max_position_embeddings=m.context,
        tie_word_embeddings=True)
    model = transformers.Qwen3ForCausalLM(config).to(dtype).eval()
    tokens = torch.tensor(prompts).repeat_interleave(c.group, 0)
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=c.new, min_new_tokens=c.new, eos_token_id=None,
                    pad_token_id=0)

    @torch.no_grad()
    def run():
        assert model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings).shape[1] == c.prompt + c.new
    return run


def in_turns(variants, rounds):
    """{name: function} -> {name: seconds of each round}; all take turns.

    Every timed call comes right after an untimed one of the same variant: the library of matrix products keeps a limited number
    of compiled kernels, and a variant whose shapes change from step to step throws out those of the others.
    """
    gc.freeze()             # else collections walk the millions of objects that importing transformers leaves, in everybody's time
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def floor(c, dtype):
    """Seconds for the products of all decode steps with the weights, at the speed of a large product, measured here, now.

    A lower bound: prefill, attention and everything elementwise come on top. At 256 rows of the default model the products
    outweigh the traffic of the cache.
    """
    a, b = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    peak = 2 * 2048 * 1024 * 1024 / min(times)                            # FLOP/s
    parameters = sum(p.numel() for p in default_model(dtype).parameters())
    return 2 * parameters * c.rows * c.new / peak


def bench_sampler(c):
    torch.set_num_threads(c.threads or torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    vocabulary = build_encoding().n_vocab
    prompts = torch.randint(0, vocabulary, (c.rows // c.group, c.prompt), generator=generator).tolist()
    makers = {"ours": ours}
    try:
        import transformers
        makers["transformers generate"] = theirs
        peer = f"transformers {transformers.__version__}"
    except ImportError:
        peer = "transformers is not installed (pip install -r requirements-extra.txt)"
    variants = {(name, dtype): make(dtype, c, prompts) for name, make in makers.items() for dtype in (torch.float32, torch.bfloat16)}
    seconds = in_turns(variants, c.rounds)
    print(f"{c.rows} rows ({c.rows // c.group} prompts x {c.group}), {c.prompt} prompt + {c.new} new tokens; "
          f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, torch {torch.__version__}; "
          f"{peer}; medians of {c.rounds} rounds in turns")
    print(f"{'':24}{'':10}{'tokens/s':>10}{'ms/step':>9}{'of floor':>9}")
    floors = {dtype: floor(c, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for (name, dtype), times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:24}{str(dtype)[6:]:10}{c.rows * c.new / middle:10,.0f}{middle / c.new * 1e3:9.2f}{floors[dtype] / middle:9.1%}")
    best = {name: min((dtype for n, dtype in seconds if n == name), key=lambda d: statistics.median(seconds[name, d])) for name in makers}
    for name in makers:
        if name != "ours":
            ratio = statistics.median(a / b for a, b in zip(seconds[name, best[name]], seconds["ours", best["ours"]]))
            print(f"ours ({str(best['ours'])[6:]}) is {ratio:.1f} times {name} ({str(best[name])[6:]})")


def main():
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words = ["--what", *words]
    c = parse_flags(Config, __doc__, argv=words)
    if c.rows < 1 or c.group < 1 or c.rows % c.group or min(c.prompt, c.new, c.rounds, c.threads + 1) < 1:
        raise BadInput(f"--rows {c.rows} must be a multiple of --group {c.group}; --prompt, --new and --rounds at least 1; "
                       "--threads at least 0")
    {"sampler": bench_sampler}[c.what](c)


if __name__ == "__main__":
    guarded(main)
