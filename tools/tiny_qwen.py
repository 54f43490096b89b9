"""A very small model of Qwen2's shape, trained on worked solutions and saved as others save theirs.

    python -m tools.tiny_qwen --data gsm8k/train.jsonl --tokenizer path/to/tokenizer --save out/tiny

The idea. Reinforcement learning on a real model takes weights that this repository does not ship.
This tool makes some, so that the way from files to files can be walked without a download: train on
worked solutions with a tokenizer of yours, save in Hugging Face's format, then train.py and eval.py
load the folder like any other. Such a model is far too small to solve anything.

Texts are half solutions (question | solution) and half reviews (question, solution, phrase |
solution), in the format that the paper's template asks for, with the loss on the part after the
bar. In a review the first solution has a wrong answer half of the time.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine.packing import Branch
from huggingface.prompts import choose_template, with_template
from huggingface.tokenizer import convert
from huggingface.weights import library, save_model
from mgrpo import PHRASES, phrase_text
from model import ModelConfig
from runtime import log
from runtime.device import compute_dtype, pick_device
from runtime.flags import AtLeast, BadInput, Between, guarded, make_folder, parse_flags
from tasks.base import LR, learning_rate, make_optimizers, new_model, train_step
from tasks.files import read_problems

# Tokens of a question with its solution, at most: a review holds the solution twice.
LONGEST, CONTEXT = 960, 2048
TEXTS = 16  # a step; half of them reviews


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ()  # JSONL files of problems with worked solutions (tasks/files.py)
    tokenizer: str = ""  # folder of the Hugging Face tokenizer
    save: str = ""  # folder for the model
    depth: Annotated[int, Between(1, 64)] = 4  # blocks, and heads; the width is 32 x depth
    base_seed: int = 0  # seed of the weights and of the texts
    base_tokens: Annotated[int, AtLeast(1)] = 6_000_000  # to train on
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute type; master weights are float32. auto: the faster one, measured
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def open_tokenizer(folder):
    """A tokenizer without a model -> encoding with the template of a base model, whose texts end
    with <|endoftext|>. Raises BadInput for a tokenizer without that token."""
    encoding = convert(folder)
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise BadInput(
            f"{folder}: this tokenizer has no <|endoftext|>, with which texts to learn from would "
            "end"
        )
    return with_template(encoding, choose_template(encoding, ()))


def solution_pair(encoding, problem, rng, review):
    """-> (prompt ids, target ids with the end token) of a worked solution, or of its review."""
    steps = re.sub(r"<<[^<>]*>>", "", problem.data.solution).strip()  # GSM8K's calculator notes
    right = f"<think>{steps}</think><answer>{problem.gold}</answer>"
    prompt = encoding.template(problem.question)
    if review:
        # Half of the first solutions state a wrong answer: there is something to find.
        answer = problem.gold if rng.random() < 0.5 else rng.randint(1, 99)
        first = f"<think>{steps}</think><answer>{answer}</answer>"
        prompt += encoding.encode_ordinary(first)
        prompt += encoding.encode_ordinary(phrase_text(rng.choice(PHRASES)))
    return prompt, encoding.encode_ordinary(right) + [encoding.eot_token]


def text_branch(number, prompt, target):
    """A prompt and the tokens to be learned behind it -> packing.Branch."""
    return Branch(None, number, (((0, number), prompt), ((1, number), target[:-1])), target)


def read_solutions(paths, encoding):
    """-> problems that have a worked solution of at most LONGEST tokens with its prompt. Raises
    BadInput where there is none."""
    problems = [p for path in paths for p in read_problems(path)[0] if p.data.solution]
    pairs = [solution_pair(encoding, p, random.Random(0), review=False) for p in problems]
    fitting = [p for p, (a, b) in zip(problems, pairs) if len(a) + len(b) <= LONGEST]
    if not fitting:
        raise BadInput(
            f"--data {','.join(paths)}: no problem there has a worked solution that, with its "
            f"prompt, has at most {LONGEST} tokens"
        )
    return fitting


def train(config, encoding, problems, device, dtype, say=print):
    """-> GPT of Qwen2's shape that has read --base-tokens of solutions and reviews."""
    depth = config.depth
    shape = ModelConfig(
        -(-encoding.n_vocab // 64) * 64,  # rounded up, as real models do
        32 * depth,
        depth,
        heads=depth,
        kv_heads=1 if depth % 4 else depth // 4,
        head_size=32,
        hidden=96 * depth,
        context=CONTEXT,
        qkv_bias=True,
        end_tokens=(encoding.eot_token,),
        rope_theta=1e6,
    )
    # A wider model takes a smaller learning rate.
    model, peak = new_model(shape, config.base_seed, device, dtype), LR * (4 / depth) ** 0.5
    optimizers, tokens, step = make_optimizers(model, peak), 0, 0
    bar = log.bar(config.base_tokens, "worked solutions", "tok")
    while tokens < config.base_tokens:
        # The texts of a step depend on the seed and the step alone.
        rng = random.Random(f"solutions/{config.base_seed}/{step}")
        pairs = [
            solution_pair(encoding, rng.choice(problems), rng, review=i % 2 == 1)
            for i in range(TEXTS)
        ]
        texts = [[text_branch(i, *pair)] for i, pair in enumerate(pairs)]
        left = 1 - tokens / config.base_tokens  # the learning rate falls to 0 over the last fifth
        lr = learning_rate(peak, step, None) * min(1.0, 5 * left)
        seen, _ = train_step(model, optimizers, texts, lr)
        tokens, step = tokens + seen, step + 1
        bar.update(seen)
    bar.close()
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters read {tokens / 1e6:.1f} M "
        f"tokens of {len(problems):,} worked solutions in {step} steps"
    )
    return model


def main():
    """Trains the model on the files of the command line, and saves it."""
    config = parse_flags(Config, __doc__)
    if not (config.data and config.tokenizer and config.save):
        raise BadInput(
            "--data, --tokenizer and --save belong together: files of solutions, a tokenizer's "
            "folder, and where the model goes"
        )
    if Path(config.save).is_file() or list(Path(config.save).glob("*.safetensors")):
        raise BadInput(
            f"--save {config.save}: there is something already; it is not written over: give "
            "another name"
        )
    encoding = open_tokenizer(config.tokenizer)
    problems = read_solutions(config.data, encoding)
    library()  # a missing package is an error before the work, not after it
    make_folder(config.save)
    device = pick_device(config.device)
    dtype = str(compute_dtype(config.dtype, device)).removeprefix("torch.")
    model = train(config, encoding, problems, device, dtype)
    model.source = Path(config.tokenizer)  # whose files save_model copies
    folder = save_model(model, config.save, torch.float32)
    print(f"{folder}: python eval.py {folder} --data {','.join(config.data)}")


if __name__ == "__main__":
    guarded(main)
