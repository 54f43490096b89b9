"""A dialogue with a model: it answers as you watch, gets a guiding phrase, and corrects itself.

    python -m tools.chat out/solve-mgrpo-0             # an empty line draws a held-out question
    python -m tools.chat path/to/Qwen2.5-Math-1.5B --temperature 0.7
    echo "What is 6*7? ## 42" | python -m tools.chat out/run    # questions from a pipe, one a line

This is one row of a rollout: an answer, a guiding phrase, a correction, and the verifier's verdict
on both when the gold answer stands behind the question and `##`. `again` continues the last answer
with another phrase, as often as the context has room. The code is that of training: mgrpo.expand
draws and scores the row, and phrases depend on the seed, the layer and the question's number. So
`eval.py --turns N` gives the same answers at the same seed, numbers, temperature and limits.

The sampler calls `Stream` after every token. A character whose bytes are split over tokens is
printed when it is complete. Control characters in a model's text are shown and have no effect.
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import codecs
import contextlib
import copy
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from huggingface.prompts import RealConfig
from mgrpo import SamplingParams, draw_phrases, expand, longest_phrase, phrase_text
from reward import Makes, extract_answer
from runtime.flags import AtLeast, BadInput, guarded, inert, parse_flags
from runtime.transcripts import bytes_of
from sample import Sampler
from tasks.opening import check_looks, open_model_and_task
from tasks.problems import Problem

PROMPT = "question> "
QUOTED = 80  # characters of an answer that a verdict quotes
HELP = (
    "Type a question, and ## with its answer if you know it. An empty line draws a question, "
    "`again` continues the last answer, Ctrl-C stops an answer, Ctrl-D leaves.\n\n"
)


@dataclass(frozen=True)
class Config:
    # A run's folder, its checkpoint.pt, a base, or a folder in Hugging Face's format.
    model: str = ""
    data: tuple[str, ...] = ()  # files of problems that empty lines draw from, for a real model
    temperature: Annotated[float, AtLeast(0)] = 0.0  # 0: always the likeliest token
    # Per answer; 0: as in training, else what fits twice into the context, at most 1,024.
    max_new_tokens: Annotated[int, AtLeast(0)] = 0
    seed: int = 0  # of the sampling, of the phrases, and of the questions that empty lines draw
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; auto: the faster one

    real: RealConfig = RealConfig(prompt_tokens=0)


# ---- the screen ----------------------------------------------------------------------------------


def say(text):
    """Prints at once. Everything on the screen is printed here."""
    print(inert(text), end="", flush=True)


class Stream:
    """Prints what a row samples, token by token: the hook `seen` of a sampler with one row. The end
    token is not printed; joined, the output is `encoding.decode` of the rest."""

    def __init__(self, encoding, end_tokens):
        self.encoding, self.end_tokens, self.count = encoding, end_tokens, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, rows, ended):
        """rows: the rows in flight. On CUDA the host waits for the device here: a dialogue does not
        show it."""
        # One token, or none: on CUDA a row's end is noticed some steps late.
        new = rows.tokens[rows.row[0], self.count : int(rows.length[0])].tolist()
        self.count += len(new)
        visible = (token for token in new if token not in self.end_tokens)
        say(self.decoder.decode(b"".join(bytes_of(self.encoding, token) for token in visible)))

    def finish(self):
        """Prints the rest of a character that was cut."""
        say(self.decoder.decode(b"", final=True) + "\n")


def verdict(layer, gold):
    """The verifier's verdict on a Layer of one row, as a line. Without a gold answer ("") it shows
    the answer that was found."""
    answer = quoted(extract_answer(layer.texts[0]) or "")
    read, wanted = f'read "{answer}"' if answer else "no answer found", f"gold {quoted(gold)}"
    truncated = f"; truncated at {int(layer.lengths[0])} tokens" if layer.truncated[0] else ""
    if not gold:
        return f"  {read}{truncated}\n"
    if layer.undecided[0]:
        return f"  ? undecided, the verifier failed: {read}, {wanted}{truncated}\n"
    if layer.correct[0]:
        return f"  ✓ right ({wanted}){truncated}\n"
    return f"  ✗ wrong: {read}, {wanted}{truncated}\n"


def quoted(answer):
    """An answer on one line, at most QUOTED characters. Of a gold answer that many texts satisfy,
    the number to be made."""
    text = " ".join((str(answer.target) if isinstance(answer, Makes) else answer).split())
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


# ---- the dialogue --------------------------------------------------------------------------------


def split_gold(line):
    """'question ## gold' -> (question, gold), with gold "" if there is none. The last ## counts,
    and GSM8K's #### serves too."""
    question, mark, gold = f" {line.strip()}".rpartition(" ##")
    return (question.strip(), gold.strip("# ")) if mark else (line.strip(), "")


class Dialogue:
    """Questions to one model, one after another.

    BadInput for a line that cannot be answered; it changes nothing. An answer that Ctrl-C stops
    (KeyboardInterrupt) is forgotten, and changes no later answer.
    """

    def __init__(self, policy, task, config):
        self.policy, self.task, self.config = policy, task, config
        self.sampler = Sampler(policy)
        self.number, self.layer = 0, None  # of the next question; the last answer
        self.held_out = None  # the task's questions, once an empty line asks for one

    def take(self, line):
        """Answers a line: a question, `again`, or nothing, which stands for a held-out question."""
        question, gold = split_gold(line)
        if question == "again":
            return self.correct()
        if question:
            return self.ask(Problem(question, gold, None))
        if self.held_out is None:
            with contextlib.redirect_stdout(sys.stderr):  # a line where there are few questions
                self.held_out = self.task.held_out(0, self.config.seed)
        if gold or not self.held_out:
            raise BadInput(
                "there is no question in this line: type one, and ## with its answer behind it if "
                "you know it"
            )
        problem = self.held_out[self.number % len(self.held_out)]
        say(f"{problem.question}\n")
        self.ask(problem)

    def ask(self, problem):
        """Answer, phrase, correction."""
        phrase = longest_phrase(self.task.encoding)
        # Room for the answer and its correction, before anything is sampled.
        self.fit(len(self.task.prompt_ids(problem)), 2, phrase)
        self.problem, self.layer = problem, None
        config, limit = self.config, self.task.max_new_tokens
        self.sampling = SamplingParams(limit, config.temperature, config.seed, self.number)
        self.number += 1
        self.grow()
        self.correct()

    def correct(self):
        """A phrase behind the last answer, and the answer to that."""
        above = self.layer
        if above is None:
            raise BadInput("there is no answer to continue yet: ask a question first")
        check_looks(self.task, above.number + 1)
        numbers = above.completions.numbers.tolist()
        # As in a rollout: the phrase depends on seed, layer and number alone.
        phrases = draw_phrases(self.sampling.seed, above.number + 1, numbers)
        ids = self.task.encoding.encode_ordinary(phrase_text(phrases[0]))
        self.fit(len(above.completions.prompts[0] + above.completions.ids[0] + ids), 1)
        say(f"» {phrases[0]}")
        self.grow(above=above, rows=[0], phrases=phrases)

    def grow(self, **where):
        """One answer, streamed, with its verdict. where: as in mgrpo.expand."""
        task = self.task if self.problem.gold else without_verifier(self.task)
        stream = Stream(task.encoding, self.policy.config.end_tokens)
        self.sampler.seen = stream
        try:
            layer = expand(self.sampler, task, [self.problem], 1, self.sampling, **where)
        except KeyboardInterrupt:
            if self.task.verifier:  # else the next comparison would read the reply to this one
                self.task.verifier.close()
            raise
        finally:
            self.sampler.seen = None
        self.layer = layer
        stream.finish()
        say(verdict(layer, self.problem.gold))

    def fit(self, tokens, answers, phrase=0):
        """BadInput unless `tokens` and so many answers, with a phrase of so many tokens between
        two, fit the model's context."""
        context, limit = self.policy.config.context, self.task.max_new_tokens
        if tokens + answers * limit + (answers - 1) * phrase > context:
            raise BadInput(
                f"a prompt of {tokens} tokens and {answers} x {limit} for answers exceed the "
                f"model's context of {context}: ask something shorter, or lower --max-new-tokens"
            )


def without_verifier(task):
    """The task for a question without a gold answer: there is nothing to compare with."""
    if task.verifier is None:
        return task
    task = copy.copy(task)
    task.verifier = None
    return task


def talk(dialogue, typed):
    """Takes lines from stdin until it ends. typed: at a terminal, where Ctrl-C stops an answer; in
    a pipe it ends the script."""
    while True:
        # Ctrl-C while a line is typed and Ctrl-C in an answer get different replies.
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


def main():
    """Flags, the model, and lines until there are no more."""
    config = parse_flags(Config, __doc__, first_word="model")
    if not config.model:
        raise BadInput("no model is named: name a run, say out/solve-mgrpo-0, as the first word")
    if sys.stdin is None:
        raise BadInput(
            "standard input is closed, and questions come from there: leave out <&-, or pipe some "
            "in with echo ... |"
        )
    typed = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not be a traceback
    sys.stdout.reconfigure(errors="replace")
    with contextlib.redirect_stdout(sys.stderr):  # a pipe gets answers only
        policy, task = open_model_and_task(
            config.model,
            eval_data=config.data,
            real=config.real,
            device=config.device,
            dtype=config.dtype,
            max_new_tokens=config.max_new_tokens,
        )
    if typed:
        with contextlib.suppress(ImportError):  # gives `input` a history; not on all systems
            import readline  # noqa: F401
        say(HELP)
    talk(Dialogue(policy, task, config), typed)


if __name__ == "__main__":
    guarded(main)
