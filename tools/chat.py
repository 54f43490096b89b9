"""A dialogue with a trained model: it answers as you watch, is told to look again, and corrects
itself.

    python chat.py --ckpt out/solve-mgrpo-0                    # a run on a built-in task; an empty
                                                               line draws a question
    python chat.py --ckpt out/run --temperature 0.7            # a run with --init, or any folder in
                                                               Hugging Face's format
    echo "What is 6*7? ## 42" | python chat.py --ckpt out/run  # questions from a pipe, one a line

The idea. What training makes by the thousand is made here once: attempt, guiding phrase,
correction, and what the verifier says of both when the question came with a gold answer behind
`##`. It is the same code: mgrpo.expand draws and scores a row, the second answer extends the first
one's cache, and the phrase is keyed by the seed and the question's number; so eval.py, at the same
seed, numbers, temperature and limits, gives the same answers. Only the way to the screen is new.
The sampler calls `Stream` after every token; a character whose bytes are split over tokens waits
until it is whole; and since what a model writes is anybody's text, control characters are shown,
not obeyed.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import codecs
import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eval import load_policy, make_verifier, max_new_tokens, run_config
from huggingface.prompts import model_folder, open_shape, open_weights
from mgrpo import PHRASES, Sampling, draw_phrases, expand, longest_phrase, phrase_text
from reward import Makes, extract_answer
from runtime.device import compute_dtype
from runtime.flags import BadInput, guarded, inert, parse_flags, ran_out
from runtime.transcripts import bytes_of
from sample import Sampler
from tasks.legacy import draw, pick_device, prompts_and_golds, task_of, token_limits
from tasks.problems import Problem
from tasks.tokenizer import build_encoding

PROMPT = "question> "
SHOWN = 80  # characters of an answer that a verdict quotes


@dataclass(frozen=True)
class Config:
    ckpt: str = ""  # a run's folder or its checkpoint.pt, or a folder in Hugging Face's format
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # at --temperature, draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # ... from the fewest likeliest whose probabilities sum to p
    min_p: float = 0.0  # ... from those at least p times as likely as the likeliest
    # per answer; 0: as in training, else what fits twice into the context, at most 1,024
    max_new_tokens: int = 0
    seed: int = 0  # of the sampling, of the phrases, and of the questions that empty lines draw
    # of prompts (prompts.py); auto: the model's own
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"
    # who says what is right: reward.py, or that library
    verifier: Literal["rules", "math-verify"] = "rules"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # compute type; auto: the faster one, measured
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


# ---- the screen ----------------------------------------------------------------------------------


def say(text):
    """Prints at once. All that goes to the screen goes through here."""
    print(inert(text), end="", flush=True)


class Stream:
    """Says what a row samples while it does: the hook `seen` of a sampler that has one row. The end
    token is not said; joined, what is said is `encoding.decode` of the rest."""

    def __init__(self, encoding, ends):
        self.encoding, self.ends, self.count = encoding, ends, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, rows, ended):
        """rows: in_flight.RowState. On CUDA the host waits for the device here, which costs a dialogue
        nothing that one could see."""
        new = rows.tokens[rows.row[0], self.count : int(rows.length[0])].tolist()
        self.count += len(new)
        say(
            self.decoder.decode(
                b"".join(bytes_of(self.encoding, token) for token in new if token not in self.ends)
            )
        )

    def finish(self):
        """What is left of a character that was cut."""
        say(self.decoder.decode(b"", final=True) + "\n")


def short(answer):
    """An answer for quoting: on one line, at most SHOWN characters; of a gold that many texts
    satisfy the number to be made."""
    text = " ".join((str(answer.target) if isinstance(answer, Makes) else answer).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def verdict(layer, gold):
    """What the verifier says of a layer (mgrpo.Layer) of one row: a line. gold: "" when none was
    given, and the answer found is shown."""
    answer = short(extract_answer(layer.texts[0]) or "")
    read, wanted = f'read "{answer}"' if answer else "no answer found", f"gold {short(gold)}"
    cut = "" if layer.completions.ended[0] else f"; cut at {int(layer.lengths[0])} tokens"
    if not gold:
        return f"  {read}{cut}\n"
    if layer.undecided[0]:
        return f"  ? undecided, the verifier failed: {read}, {wanted}{cut}\n"
    return (
        f"  ✓ right ({wanted}){cut}\n"
        if layer.correct[0]
        else f"  ✗ wrong: {read}, {wanted}{cut}\n"
    )


# ---- the dialogue --------------------------------------------------------------------------------


class Partner(NamedTuple):
    """Who answers, and who judges."""

    model: Any
    encoding: Any
    task: Any  # of tasks.py; None for a real model
    new: int  # most tokens of an answer
    verifier: Any = None  # as in reward.score


def split_gold(line):
    """'question ## gold' -> (question, gold), gold "" without one. The last ## counts, and GSM8K's
    #### serves too."""
    question, mark, gold = f" {line.strip()}".rpartition(" ##")
    return (question.strip(), gold.strip("# ")) if mark else (line.strip(), "")


class Dialogue:
    """Questions to one model, one after another. BadInput for what cannot be asked, and all is as
    it was; an answer that is broken off (KeyboardInterrupt) is forgotten, and changes none that
    comes after it."""

    def __init__(self, partner, c):
        self.partner, self.c, self.encoding, self.verifier = (
            partner,
            c,
            partner.encoding,
            partner.verifier,
        )
        self.sampler = Sampler(partner.model)
        # of questions; the last answer; how often that question was looked at
        self.number, self.layer, self.looks = 0, None, 0
        self.fit(1, 2)

    def take(self, line):
        """Answers a line: a question, `again`, or nothing, which stands for question `number` of
        the task's held-out ones."""
        question, gold = split_gold(line)
        if question == "again":
            return self.look()
        if not question and (gold or self.partner.task is None):
            raise BadInput(
                "there is no question in this line; type one, and ## with its answer behind it if "
                "you know that"
            )
        problem = (
            Problem(question, gold, None)
            if question
            else draw(self.partner.task, "held out", self.c.seed, self.number)
        )
        say("" if question else f"{problem.question}\n")
        self.ask(problem)

    def ask(self, problem):
        """Attempt, phrase, correction."""
        prompts, golds = prompts_and_golds(self.encoding, [problem])
        self.fit(len(prompts[0]), 2)
        self.layer, self.golds, self.looks = None, golds, 0
        self.how = Sampling(
            self.partner.new,
            self.c.temperature,
            self.c.seed,
            first_row=self.number,
            filters=dict(top_k=self.c.top_k, top_p=self.c.top_p, min_p=self.c.min_p),
            verifier=self.verifier if problem.gold else None,
        )
        self.number += 1
        self.turn(prompts[0])
        self.look()

    def look(self):
        """A phrase behind the last answer, and the answer to that. The first phrase is drawn; those
        of `again` follow it in order."""
        if self.layer is None:
            raise BadInput(
                "there is no answer yet that could be looked at again: ask something first"
            )
        last = self.layer.completions
        first = PHRASES.index(draw_phrases(self.how.seed, [self.how.first_row])[0])
        phrase = PHRASES[(first + self.looks) % len(PHRASES)]
        prefix = self.encoding.encode_ordinary(phrase_text(phrase))
        self.fit(len(last.prompts[0]) + len(last.ids[0]) + len(prefix), 1)
        say(f"» {phrase}")
        self.turn(prefix)
        self.looks += 1

    def turn(self, prefix):
        """One answer to a prompt, or behind the last answer and `prefix` (token ids), with its
        verdict."""
        stream = self.sampler.seen = Stream(self.encoding, self.partner.model.config.end_tokens)
        try:
            layer = expand(
                self.sampler, self.encoding, self.golds, [prefix], 1, self.how, self.layer
            )
        except KeyboardInterrupt:
            if self.verifier:  # or the next comparison would read the reply to this one
                self.verifier.close()
            raise
        finally:
            self.sampler.seen = None
        self.layer = layer
        stream.finish()
        say(verdict(layer, self.golds[0]))

    def fit(self, tokens, answers):
        """BadInput unless `tokens` and so many answers, with a phrase between two, fit the model's
        context."""
        context, new = self.partner.model.config.context, self.partner.new
        if tokens + answers * new + (answers - 1) * longest_phrase(self.encoding) > context:
            raise BadInput(
                f"a prompt of {tokens} tokens and {answers} x {new} for answers exceed the model's "
                f"context of {context}: ask "
                "something shorter, or lower --max-new-tokens"
            )


def talk(dialogue, typed):
    """Takes lines from stdin until it ends. typed: at a terminal, where Ctrl-C stops an answer;
    with a pipe it ends the script."""
    while True:
        line = None
        try:
            line = input(PROMPT if typed else "")
            dialogue.take(line)
            say("\n")
        except EOFError:
            say("\n" if typed else "")
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            say("\nCtrl-D leaves\n" if line is None else "\n(stopped)\n\n")
        except BadInput as error:
            say(f"{error}\n\n")


# ---- opening -------------------------------------------------------------------------------------


def open_partner(c):
    """The model of --ckpt -> Partner. BadInput for what is none."""
    path = Path(c.ckpt)
    if not c.ckpt or not path.exists():
        raise BadInput(
            "--ckpt "
            f"{c.ckpt or 'is missing'}{': there is no such file or folder' if c.ckpt else ''}; "
            "name a run, say "
            "out/solve-mgrpo-0 (python train.py makes it), or a folder in Hugging Face's format"
        )
    try:
        return (open_ours if path.is_file() or (path / "checkpoint.pt").exists() else open_real)(
            c, path
        )
    except BadInput as error:  # who said this speaks of the flags of eval.py
        raise BadInput(
            str(error).replace("--checkpoint", "--ckpt").replace("--init", "--ckpt")
        ) from None


def open_ours(c, path):
    """A run on a built-in task: its folder or its checkpoint.pt -> Partner."""
    for name in ("template", "verifier"):
        if getattr(c, name) != getattr(Config, name):
            raise BadInput(
                f"--{name}: this model was trained on a built-in task, which has its own; leave it "
                "out"
            )
    model, trained = load_policy(
        path if path.is_file() else path / "checkpoint.pt", c.dtype, c.device
    )
    task = task_of(trained)
    return Partner(
        model,
        build_encoding(),
        task,
        c.max_new_tokens or trained.get("max_new_tokens") or token_limits(task)[1],
    )


def open_real(c, folder):
    """A folder in Hugging Face's format, or a run that has one as its model/ -> Partner. The
    weights come last."""
    path, verifier = model_folder(folder), make_verifier(c.verifier)
    trained = (
        run_config(path.parent, ("max_new_tokens",))
        if (path.parent / "metrics.jsonl").exists()
        else {}
    )
    shape, encoding = open_shape(path, c.template)
    new = (
        c.max_new_tokens
        or trained.get("max_new_tokens")
        or max_new_tokens(shape, encoding, min(512, shape.context // 2), 0)
    )
    device = pick_device(c.device)
    return Partner(
        open_weights(path, shape, encoding, compute_dtype(c.dtype, device), device),
        encoding,
        None,
        new,
        verifier,
    )


def validate(c):
    if not 0 <= c.temperature < math.inf or c.max_new_tokens < 0:
        raise BadInput("--temperature and --max-new-tokens must be at least 0")
    if c.top_k < 0 or not 0 < c.top_p <= 1 or not 0 <= c.min_p < 1:
        raise BadInput(
            "--top-k must be at least 0, --top-p above 0 and at most 1, --min-p at least 0 and "
            "below 1"
        )
    if not c.temperature and (c.top_k, c.top_p, c.min_p) != (0, 1, 0):
        raise BadInput(
            "--top-k, --top-p and --min-p say which tokens may be drawn, and at --temperature 0 "
            "none is drawn: raise it"
        )


def greeting(partner, c):
    """What somebody at a terminal is told: what to type, by an example."""
    problem = (
        draw(partner.task, "train", c.seed, 0)
        if partner.task
        else Problem("What is 6*7?", "42", None)
    )
    empty = "an empty line draws a new question, " if partner.task else ""
    return (
        f"{c.ckpt}{f': {partner.task}' if partner.task else ''}\n"
        f"Type a question, and its answer behind ## if you know that:  {problem.question} ## "
        f"{short(problem.gold)}\n"
        f"Besides, {empty}`again` has the last answer looked at once more, Ctrl-C stops an answer, "
        "Ctrl-D leaves.\n\n"
    )


def main():
    """Flags, the model, and lines until there are no more."""
    c = parse_flags(Config, __doc__)
    validate(c)
    if sys.stdin is None:
        raise BadInput(
            "standard input is closed, and questions come from there: leave out <&-, or pipe some "
            "in with echo ... |"
        )
    typed = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # what cannot be read or shown is no traceback
    sys.stdout.reconfigure(errors="replace")
    try:
        dialogue = Dialogue(open_partner(c), c)
        if typed:
            with contextlib.suppress(ImportError):  # gives `input` a history; not everywhere
                import readline  # noqa: F401
            say(greeting(dialogue.partner, c))
        talk(dialogue, typed)
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            raise BadInput(
                f"out of memory ({str(error).split('.')[0]}): lower --max-new-tokens, or take a "
                "smaller model"
            ) from None
        raise


if __name__ == "__main__":
    guarded(main)
