"""The table of memory needs: models x completion length x group sizes -> GB, computed.

    python -m tools.memory_table                                    # the table of docs/memory.md
    python -m tools.memory_table --group-sizes 8,4 --ranks 8        # eight GPUs
    python -m tools.memory_table --tokens-per-microbatch 8192 --recompute no

Nothing is loaded or measured: runtime/memory.py computes the parts from the models' shapes.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from model import ModelConfig
from runtime.flags import AtLeast, guarded, parse_flags
from runtime.memory import GB, plan, row_tokens

PHRASE = 24  # tokens of the longest guiding phrase with a large vocabulary, and a few

SHAPES = {  # V, D, L, N, K, C, hidden, context: from the models' config.json
    "Qwen2.5-0.5B": ModelConfig(
        151_936, 896, 24, 14, 2, 64, 4864, 32_768, qkv_bias=True, tied=True
    ),
    "Llama-3.2-1B": ModelConfig(128_256, 2048, 16, 32, 8, 64, 8192, 131_072, tied=True),
    "Qwen2.5-Math-1.5B": ModelConfig(
        151_936, 1536, 28, 12, 2, 128, 8960, 4096, qkv_bias=True, tied=True
    ),
    "Qwen3-4B": ModelConfig(151_936, 2560, 36, 32, 8, 128, 9728, 40_960, qk_norm=True, tied=True),
    "Qwen2.5-Math-7B": ModelConfig(
        152_064, 3584, 28, 28, 4, 128, 18_944, 4096, qkv_bias=True, tied=False
    ),
}


@dataclass(frozen=True)
class Config:
    prompts: Annotated[int, AtLeast(1)] = 32  # P, questions per step
    # completions per prompt in each layer; empty: 8,4 and 16,4
    group_sizes: Annotated[tuple[int, ...], AtLeast(1)] = ()
    prompt_tokens: Annotated[int, AtLeast(1)] = 512  # most tokens of a question's prompt
    # tokens that go through the model together in training
    tokens_per_microbatch: Annotated[int, AtLeast(1)] = 16_384
    # tokens whose keys and values the sampler may hold; 0: those of the whole rollout
    cache_tokens: Annotated[int, AtLeast(0)] = 0
    recompute: Literal["yes", "no"] = "yes"  # activation checkpointing
    # GPUs that share the questions, the masters and Adam's moments
    ranks: Annotated[int, AtLeast(1)] = 1
    reference: Literal["yes", "no"] = "yes"  # a copy of the model for the KL term
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # compute type


TITLES = (
    "model",
    "completion",
    "group sizes",
    "weights, reference",
    "masters, gradients, Adam",
    "activations",
    "logits",
    "sum, GB",
    "+ KV cache",
)


def lengths(shape, layers, prompt):
    """Completion lengths to show: 1,024 and 4,096 where a row of them fits the model's context,
    else the longest that does."""
    fitting = [
        length
        for length in (1024, 4096)
        if row_tokens(layers, prompt, length, PHRASE) <= shape.context
    ]
    # what a row without completions leaves of the context, for each layer's completion
    room = shape.context - row_tokens(layers, prompt, 0, PHRASE)
    return fitting or [max(1, room // layers)]


def row(name, shape, completion, group_sizes, config):
    """A line of the table."""
    planned = plan(
        shape,
        compute=getattr(torch, config.dtype),
        prompts=config.prompts,
        group_sizes=group_sizes,
        prompt=config.prompt_tokens,
        completion=completion,
        phrase=PHRASE,
        tokens_per_microbatch=config.tokens_per_microbatch,
        cache_tokens=config.cache_tokens,
        reference=getattr(torch, config.dtype) if config.reference == "yes" else None,
        recompute=config.recompute == "yes",
        ranks=config.ranks,
    )
    # What belongs together in the table's columns, in the order of TITLES.
    sizes = (
        planned["weights"] + planned["reference"],
        planned["masters and gradients"] + planned["Adam"],
        planned["activations"] + planned["gathered"],
        planned["logits"],
        sum(planned.values()) - planned["KV cache"],
        planned["KV cache"],
    )
    groups = ",".join(map(str, group_sizes))
    cells = [name, f"{completion:,}", groups, *(f"{size / GB:.1f}" for size in sizes)]
    return f"| {' | '.join(cells)} |"


def main():
    """Prints the table in Markdown, a line for each model, length and group sizes."""
    config = parse_flags(Config, __doc__)
    print(f"| {' | '.join(TITLES)} |\n{'|---' * len(TITLES)}|")
    choices = [config.group_sizes] if config.group_sizes else [(8, 4), (16, 4)]
    for name, shape in SHAPES.items():
        for completion in lengths(shape, len(choices[0]), config.prompt_tokens):
            for group_sizes in choices:
                print(row(name, shape, completion, group_sizes, config))


if __name__ == "__main__":
    guarded(main)
