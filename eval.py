"""The paper's table for a checkpoint: how often the first answer is right, the second, and what the second look changed.

    python eval.py --checkpoint out/solve-mgrpo-0/checkpoint.pt
    python eval.py --checkpoint out/solve-mgrpo-0/checkpoint.pt --samples 4 --temperature 0.7 --json table.json

The idea. Every question is answered (turn 1), a guiding phrase is appended, and the model answers again (turn 2). With c1, c2 =
right or wrong in each turn, over all questions (SCoRe, arXiv 2409.12917, section 3):

    Acc@t1 = mean c1      Acc@t2 = mean c2       Δ(t1,t2) = Acc@t2 - Acc@t1
    Δ i→c  = share wrong first, right second     Δ c→i = share right first, wrong second     Δ(t1,t2) = Δ i→c - Δ c→i

Questions are held out: training cannot draw them. Errors are standard errors over QUESTIONS: with several samples of each, the
samples of one question are averaged first, since they are not independent.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from flags import BadInput, guarded, parse_flags
from mgrpo import Sampling, expand, second_look
from model import compute_dtype, load_checkpoint
from pretrain import pick_device
from sample import Sampler
from tasks import draw, prompts_and_golds, task_of, token_limits
from tokenizer import build_encoding

COLUMNS = {"t1": "Acc@t1", "t2": "Acc@t2", "delta": "Δ(t1,t2)", "i2c": "Δ i→c", "c2i": "Δ c→i"}
ROWS = 1024               # sampled at a time


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""      # the checkpoint.pt of a run, or a base-....pt of pretrain.py
    questions: int = 1024     # held-out questions
    samples: int = 1          # answers sampled per question at --temperature (greedy needs one)
    temperature: float = 1.0  # besides greedy, which is always shown
    top_k: int = 0            # at --temperature, draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0        # ... from the fewest likeliest whose probabilities sum to p
    min_p: float = 0.0        # ... from those at least p times as likely as the likeliest
    turns: Literal["1", "2"] = "2"                            # 1 skips the second look
    cache_tokens: int = 0     # tokens whose keys and values the sampler may hold; 0: no limit on a CPU, half of the free memory on CUDA
    seed: int = 0             # of the questions and of the sampling
    json: str = ""            # also write the figures to this file
    device: Literal["auto", "cpu", "cuda"] = "auto"           # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # compute type; auto: the faster one, measured


def held_out_questions(task, count, seed=0):
    """`count` DIFFERENT held-out problems; fewer when 20 x count draws do not bring as many (Countdown has few)."""
    found = {}
    for index in range(20 * count):
        problem = draw(task, "held out", seed, index)
        found.setdefault(task.canonical(problem), problem)
        if len(found) == count:
            break
    return list(found.values())


def two_turns(sampler, encoding, problems, how, samples=1, turns=2):
    """-> (right [Q, samples, turns] bool, cut [Q, samples, turns] bool, tokens [Q, samples, turns]) for Q problems."""
    prompts, golds = prompts_and_golds(encoding, problems)
    layers = [expand(sampler, encoding, golds, prompts, samples, how)]
    if turns == 2:
        layers.append(second_look(sampler, encoding, golds, layers[0], 1, how))
    shape = len(problems), samples
    return tuple(torch.stack([x.view(shape) for x in column], -1) for column in
                 zip(*[(layer.correct, ~layer.completions.ended.cpu(), layer.lengths) for layer in layers]))


def evaluate(sampler, encoding, problems, max_new_tokens, *, temperature=0.0, samples=1, turns=2, seed=0, filters=None, say="evaluating"):
    """-> {"t1": (mean, standard error), ..., "cut": share, "tokens": mean of both turns together, "questions", "samples",
    "temperature"}."""
    parts, at_once = [], max(1, ROWS // samples)
    for start in tqdm(range(0, len(problems), at_once), desc=say, unit="batch", disable=None, leave=False):
        how = Sampling(max_new_tokens, temperature, seed, first_row=start * samples, filters=filters or {})
        parts.append(two_turns(sampler, encoding, problems[start:start + at_once], how, samples, turns))
    right, cut, tokens = (torch.cat(column).float() for column in zip(*parts))
    result = summarise(right)
    return result | dict(cut=cut.mean().item(), tokens=tokens.sum(-1).mean().item(), questions=len(problems), samples=samples,
                         temperature=temperature)


def summarise(right):
    """right: [Q, samples, turns] 0/1 -> {name: (mean, standard error over questions)} of the columns that apply."""
    c1, c2 = right[..., 0], right[..., -1]
    values = dict(t1=c1)
    if right.shape[-1] == 2:
        values |= dict(t2=c2, delta=c2 - c1, i2c=(1 - c1) * c2, c2i=c1 * (1 - c2))
    return {name: mean_and_error(x.mean(1)) for name, x in values.items()}


def mean_and_error(x):
    """Mean of a vector and its standard error, std / sqrt(n)."""
    return x.mean().item(), (x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan)


def table(rows):
    """{name: result of evaluate} -> the paper's table as text, in percent."""
    shown = {k: v for k, v in COLUMNS.items() if all(k in result for result in rows.values())}
    lines = [f"{'':24}" + "".join(f"{title:>15}" for title in shown.values())]
    for name, result in rows.items():
        cells = [f"{100 * result[k][0]:{'+' if k == 'delta' else ''}.1f} ± {100 * result[k][1]:.1f}" for k in shown]
        lines.append(f"{name:24}" + "".join(f"{cell:>15}" for cell in cells))
    one = next(iter(rows.values()))
    return "\n".join([*lines, f"(percent ± standard error; {one['questions']} held-out questions)"])


def load_policy(path, dtype, device):
    """-> (model, the config it was trained with as a dict). BadInput for what is not a checkpoint of a run or a base."""
    if not path:
        raise BadInput("--checkpoint is missing: name the checkpoint.pt of a run, say out/solve-mgrpo-0/checkpoint.pt")
    device = pick_device(device)
    try:
        model, extra = load_checkpoint(path, compute_dtype(dtype, device), device)
        return model, extra["config"]
    except FileNotFoundError:
        raise BadInput(f"--checkpoint {path}: there is no such file; `python train.py` makes out/<run>/checkpoint.pt") from None
    except (ValueError, KeyError) as error:
        raise BadInput(f"--checkpoint {error}" if isinstance(error, ValueError) else f"--checkpoint {path} does not say its task") from None


def make_sampler(model, cache_tokens):
    """A sampler whose cache holds at least one row of any length. BadInput for a limit below that."""
    if 0 < cache_tokens < model.config.context:
        raise BadInput(f"--cache-tokens {cache_tokens}: a row may need {model.config.context}, the model's context; use that or more, or 0")
    return Sampler(model, cache_tokens=cache_tokens)


def main():
    """Flags, the checkpoint, the table."""
    c = parse_flags(Config, __doc__)
    if c.questions < 2 or c.samples < 1 or c.temperature < 0 or c.cache_tokens < 0:
        raise BadInput("--questions must be at least 2, --samples at least 1, --temperature and --cache-tokens at least 0")
    if c.top_k < 0 or not 0 < c.top_p <= 1 or not 0 <= c.min_p < 1:
        raise BadInput("--top-k must be at least 0, --top-p above 0 and at most 1, --min-p at least 0 and below 1")
    model, trained = load_policy(c.checkpoint, c.dtype, c.device)
    encoding, task = build_encoding(), task_of(trained)
    problems, sampler = held_out_questions(task, c.questions, c.seed), make_sampler(model, c.cache_tokens)
    max_new, turns = trained.get("max_new_tokens") or token_limits(task)[1], int(c.turns)
    rows = {"greedy": evaluate(sampler, encoding, problems, max_new, turns=turns, seed=c.seed)}
    if c.temperature:
        rows[f"temperature {c.temperature:g}"] = evaluate(sampler, encoding, problems, max_new, turns=turns, seed=c.seed,
                                                          temperature=c.temperature, samples=c.samples,
                                                          filters=dict(top_k=c.top_k, top_p=c.top_p, min_p=c.min_p))
    print(f"{c.checkpoint}: {task}\n{table(rows)}")
    if c.json:
        Path(c.json).write_text(json.dumps(dict(checkpoint=c.checkpoint, task=str(task), **rows), indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
