"""How a question is put to a real model: chat templates as plain functions, and the end tokens.

    python -m huggingface.prompts path/to/Qwen2.5-Math-1.5B "What is 6*7?"

shows the prompt as the model gets it, token by token. The idea. A chat template is a text with
special tokens in it. Here it is a list of parts: a `str` is text, which is encoded as text whatever
it holds, and a `Special` is one token. A question that contains "<|im_end|>" is ten odd characters
and ends no turn.

An instruct model was trained on one template, and its end token tells which: <|im_end|> is ChatML
(Qwen, SmolLM2), <|eot_id|> is Llama-3's. A base model ends texts, not turns; the paper's template
explains the format to it. `--template` overrides. Layer 2 needs no template of its own: it
continues the model's turn (mgrpo.py, deviation 1).
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C during the other imports is handled

# isort: split
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from huggingface.tokenizer import convert
from huggingface.weights import FILES, MAX_END_TOKENS, ids_of, load_model, read_config
from runtime.flags import AtLeast, BadInput, guarded, read_json

# The paper's system text (its Table 1) as one public re-implementation has it; the other one has
# the same sentences but for "mathematical", and an ending that names no <answer>.
SYSTEM = (
    "You are a helpful AI assistant. A conversation between User and Assistant. The User asks a "
    "mathematical question, and the Assistant solves it step-by-step. The Assistant must first "
    "output a detailed step-by-step reasoning process enclosed within <think></think> tags. After "
    "the </think> tag, the Assistant must provide the final answer enclosed within "
    "<answer></answer>."
)
# For instruct models, which have a format of their own.
INSTRUCT = "Reason step by step, and give the final answer within \\boxed{}."


@dataclass(frozen=True)
class RealConfig:
    """A model in Hugging Face's format, and its questions from files."""

    # of prompts; auto: the model's own
    template: Literal["auto", "paper", "words", "chatml", "llama3", "plain"] = "auto"
    # questions with a longer prompt are left out, and counted
    prompt_tokens: Annotated[int, AtLeast(1)] = 512
    # who decides what is right: the rules of verifier/, or that library
    verifier: Literal["rules", "math-verify"] = "rules"


class Special(str):
    """A part of a prompt that is one special token; any other part is text."""


# ---- templates -----------------------------------------------------------------------------------


def chatml(messages):
    """ChatML, up to the assistant's turn. messages: [(role, text), ...] -> parts."""
    parts = []
    for role, text in messages:
        parts += [Special("<|im_start|>"), f"{role}\n{text}", Special("<|im_end|>"), "\n"]
    return [*parts, Special("<|im_start|>"), "assistant\n"]


def header(role):
    return [Special("<|start_header_id|>"), role, Special("<|end_header_id|>")]


def llama3(messages):
    """Llama-3's template, up to the assistant's turn. messages: [(role, text), ...] -> parts.

    Llama 3.1 and 3.2 put two lines with dates before the system text. They are left out: a date in
    a prompt would make results depend on the day.
    """
    parts = [Special("<|begin_of_text|>")]
    for role, text in messages:
        parts += [*header(role), f"\n\n{text.strip()}", Special("<|eot_id|>")]
    return [*parts, *header("assistant"), "\n\n"]


def paper(question):
    """The paper's template, for base models: a ChatML frame with a line break before each end."""
    parts = []
    for role, text in (("system", SYSTEM), ("user", question)):
        parts += [Special("<|im_start|>"), f"{role}\n{text}\n", Special("<|im_end|>"), "\n"]
    return [*parts, Special("<|im_start|>"), "assistant\n"]


def paper_in_words(question):
    """The same for base models whose tokenizer has no ChatML."""
    return [f"{SYSTEM}\n\nUser: {question}\n\nAssistant:"]


TEMPLATES = {  # name: parts of a question's prompt, the token that ends the assistant's turn
    "paper": (paper, "<|im_end|>"),
    "words": (paper_in_words, None),
    "chatml": (lambda question: chatml([("system", INSTRUCT), ("user", question)]), "<|im_end|>"),
    "llama3": (lambda question: llama3([("system", INSTRUCT), ("user", question)]), "<|eot_id|>"),
    "plain": (lambda question: [f"{question}\n"], None),
}


def encode_parts(encoding, parts):
    """-> token ids. A text never becomes a special token. Raises BadInput for a special token that
    the tokenizer lacks."""
    ids = []
    for part in parts:
        if not isinstance(part, Special):
            ids += encoding.encode_ordinary(part)
        elif part in encoding.special_tokens_set:
            ids.append(encoding.encode_single_token(part))
        else:
            raise BadInput(
                f"the tokenizer has no token {part}, which this --template needs; use auto or plain"
            )
    return ids


def encode_question(question, encoding, name):
    """-> token ids of a question's prompt under the template `name`.

    `opening`, the tokens that the original tokenizer puts before every text (Llama-3's
    <|begin_of_text|>), stand before the templates that do not write them out.
    """
    # A template that begins with a special token writes its opening itself.
    parts = TEMPLATES[name][0](question)
    opening = [] if isinstance(parts[0], Special) else encoding.opening
    return opening + encode_parts(encoding, parts)


def choose_template(encoding, ends):
    """-> name of the template of a model whose completions end with the tokens (ids) `ends`."""
    special = encoding.special_tokens_set
    # The texts of the end tokens: instruct models end turns with their template's token.
    end_texts = {token for token in special if encoding.encode_single_token(token) in ends}
    for name in ("chatml", "llama3"):
        if TEMPLATES[name][1] in end_texts:
            return name
    return "paper" if {"<|im_start|>", "<|im_end|>"} <= special else "words"


def with_template(encoding, name):
    """-> the encoding, with `template(question) -> token ids` and `template_name` set on it.

    Encodes one question, so that a template which the tokenizer cannot write is refused now and not
    during a run.
    """
    encoding.template_name = name
    encoding.template = functools.partial(encode_question, encoding=encoding, name=name)
    encoding.template("?")
    return encoding


# ---- a model in a folder -------------------------------------------------------------------------


def model_folder(folder):
    """-> Path of the model in a folder: the folder itself, or model/ in the folder of a run. Raises
    BadInput for what is not a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: there is no such folder; nothing is downloaded here: get a model "
            "first, say with `hf download Qwen/Qwen2.5-0.5B --local-dir FOLDER`"
        )
    if (folder / "metrics.jsonl").exists() and not (folder / "model").is_dir():
        raise BadInput(f"{folder}: this run has not saved a model yet")
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def end_tokens(folder):
    """-> ids of the tokens that end a completion, from config.json and generation_config.json
    together; either may name one or several."""
    ids = ids_of(
        read_json(Path(folder) / "config.json", FILES), "eos_token_id", f"{folder}/config.json"
    )
    path = Path(folder) / "generation_config.json"
    if path.exists():
        ids += ids_of(read_json(path, FILES), "eos_token_id", path)
    return tuple(dict.fromkeys(ids))


def open_tokenizer(folder, template="auto"):
    """-> encoding with its `template`, ids of the tokens that end a completion.

    Raises BadInput for whatever tokenizer.convert refuses, and for a template that the tokenizer
    has no tokens for.
    """
    encoding, ends = convert(folder), end_tokens(folder)
    # The template on which a run of this project trained the model, if one did.
    trained_on = read_json(Path(folder) / "config.json", FILES).get("prompt_template")
    if trained_on is not None and trained_on not in [*TEMPLATES]:  # a list: it may be unhashable
        raise BadInput(
            f"{folder}/config.json: prompt_template = {trained_on!r:.60} is not one of "
            f"{', '.join(TEMPLATES)}"
        )
    name = template if template != "auto" else trained_on or choose_template(encoding, ends)
    # A base model's files do not name the end of a turn, which its template has all the same.
    turn_end = TEMPLATES[name][1]
    if turn_end in encoding.special_tokens_set:
        ends = tuple(dict.fromkeys((*ends, encoding.encode_single_token(turn_end))))
    if not 1 <= len(ends) <= MAX_END_TOKENS:
        raise BadInput(
            f"{folder}: with config.json, generation_config.json and the template {name} "
            f"{len(ends)} tokens end a completion; the sampler wants 1 to {MAX_END_TOKENS}: "
            "correct eos_token_id"
        )
    return with_template(encoding, name), ends


def open_shape(folder, template="auto"):
    """Everything of a model but its weights -> ModelConfig with the tokens that end a completion,
    encoding with its `template`. Raises BadInput also for a tokenizer with more ids than the model
    has."""
    config, (encoding, ends) = read_config(folder), open_tokenizer(folder, template)
    # A larger id would be a row that the embedding table does not have.
    largest = max(encoding.max_token_value, *ends)
    if largest >= config.vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer or eos_token_id has ids up to {largest}, the model only "
            f"{config.vocab_size} rows"
        )
    return replace(config, end_tokens=ends), encoding


def open_weights(folder, config, encoding, compute, device):
    """The rest -> GPT with the config and the template of `open_shape`. Raises BadInput for
    whatever weights.load_model refuses."""
    model = load_model(folder, compute, device)
    model.config, model.prompt_template = config, encoding.template_name
    return model


def main():
    """Prints the prompt of a question under a model's template, token by token."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return
    if len(sys.argv) != 3:
        raise BadInput("usage: python -m huggingface.prompts FOLDER QUESTION")
    encoding, ends = open_tokenizer(model_folder(sys.argv[1]))
    ids = encoding.template(sys.argv[2])
    print(
        f"template {encoding.template_name}, {len(ids)} tokens; a completion ends with "
        f"{' or '.join(encoding.decode([end]) for end in ends)}"
    )
    print(" ".join(repr(encoding.decode([i])) for i in ids))


if __name__ == "__main__":
    guarded(main)
