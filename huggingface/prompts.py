"""How a question is put to a real model: chat templates as plain functions, the tokens that end a
turn, and a model opened for use.

    python prompts.py path/to/Qwen2.5-Math-1.5B "What is 6*7?"       # the prompt as the model will
                                                                     see it, token by token

The idea. A chat template is a text with special tokens in it. Here it is a list of parts: a `str`
is text, which is encoded as text whatever it says, and a `Special` is one token. So a question that
contains "<|im_end|>" holds ten odd characters and ends nobody's turn.

Which template? An instruct model was trained on one, and says which by the token that ends its
turns: <|im_end|> is ChatML (Qwen, SmolLM2), <|eot_id|> is Llama-3's. A base model ends texts, not
turns; for it there is the paper's template, which explains the format. `--template` overrides.

Layer 2 needs no template of its own: it continues the model's turn (mgrpo.py, deviation 1).
"""

from runtime import flags  # noqa: F401 - first, so that Ctrl-C while torch is imported is one sentence too

# isort: split
import functools
import sys
from dataclasses import replace
from pathlib import Path

from huggingface.tokenizer import convert
from huggingface.weights import FILES, ids_of, read_config
from model import GPT
from runtime.flags import BadInput, guarded, read_json

# The paper's system text (its Table 1) as one public re-implementation has it; the other has the
# same sentences but for "mathematical" and an ending that names no <answer>.
SYSTEM = (
    "You are a helpful AI assistant. A conversation between User and Assistant. The User asks a "
    "mathematical question, and the "
    "Assistant solves it step-by-step. The Assistant must first output a detailed step-by-step "
    "reasoning process enclosed within "
    "<think></think> tags. After the </think> tag, the Assistant must provide the final answer "
    "enclosed within <answer></answer>."
)
# what instruct models are told: they have their own ways
INSTRUCT = "Reason step by step, and give the final answer within \\boxed{}."


class Special(str):
    """A part of a prompt that is one special token; any other part is text."""


# ---- templates -----------------------------------------------------------------------------------


def chatml(messages):
    """ChatML, up to where the assistant begins. messages: [(role, text), ...] -> parts."""
    parts = []
    for role, text in messages:
        parts += [Special("<|im_start|>"), f"{role}\n{text}", Special("<|im_end|>"), "\n"]
    return [*parts, Special("<|im_start|>"), "assistant\n"]


def llama3(messages):
    """Llama-3's template. messages: [(role, text), ...] -> parts. (Llama 3.1 and 3.2 put two lines
    with dates before the system text; a date in a prompt makes results depend on the day, so they
    are left out here.)"""
    parts = [Special("<|begin_of_text|>")]
    for role, text in [*messages, ("assistant", None)]:
        parts += [
            Special("<|start_header_id|>"),
            role,
            Special("<|end_header_id|>"),
            "\n\n" if text is None else f"\n\n{text.strip()}",
        ]
        parts += [] if text is None else [Special("<|eot_id|>")]
    return parts


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
    """-> token ids. A text stays a text: it never becomes a special token. BadInput for a special
    token that the tokenizer lacks."""
    ids = []
    for part in parts:
        if isinstance(part, Special) and part not in encoding.special_tokens_set:
            raise BadInput(
                f"the tokenizer has no token {part}, which this --template needs; use auto or plain"
            )
        ids += (
            [encoding.encode_single_token(part)]
            if isinstance(part, Special)
            else encoding.encode_ordinary(part)
        )
    return ids


def encode_question(question, encoding, name):
    """Token ids of a question's prompt under the template `name`; what the tokenizer itself puts
    first (Llama-3's <|begin_of_text|>) stands before those templates that do not write it out."""
    parts = TEMPLATES[name][0](question)
    return ([] if isinstance(parts[0], Special) else encoding.opening) + encode_parts(
        encoding, parts
    )


def choose_template(encoding, ends):
    """The template of a model whose texts or turns end with these tokens (ids)."""
    names = {
        token
        for token in encoding.special_tokens_set
        if encoding.encode_single_token(token) in ends
    }
    for name in ("chatml", "llama3"):
        if TEMPLATES[name][1] in names:
            return name
    return "paper" if {"<|im_start|>", "<|im_end|>"} <= encoding.special_tokens_set else "words"


# ---- a real model --------------------------------------------------------------------------------


def end_tokens(folder):
    """The tokens (ids) that end a completion, by config.json and generation_config.json together;
    either may name one or several."""
    found = []
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or (Path(folder) / name).exists():
            found += ids_of(
                read_json(Path(folder) / name, FILES), "eos_token_id", Path(folder) / name
            )
    return tuple(dict.fromkeys(found))


def open_bare_tokenizer(folder):
    """A tokenizer without a model, for one that is yet to be trained: a base model's, whose texts
    end with <|endoftext|>."""
    encoding = convert(folder)
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise BadInput(
            f"{folder}: this tokenizer has no <|endoftext|>, with which texts to learn from would "
            "end"
        )
    return with_template(encoding, choose_template(encoding, ()))


def with_template(encoding, name):
    """Gives the encoding its `template`. One that its tokenizer cannot write is refused now, not in
    mid-run."""
    encoding.template_name, encoding.template = (
        name,
        functools.partial(encode_question, encoding=encoding, name=name),
    )
    encoding.template("?")
    return encoding


def open_tokenizer(folder, template="auto"):
    """-> (encoding whose `template` puts a question to the model, the tokens that end its
    completions). BadInput for whatever tokenizer.convert refuses, and for a template that the
    tokenizer has no tokens for."""
    encoding, ends = convert(folder), end_tokens(folder)
    # which we trained it on, if we did
    known = read_json(Path(folder) / "config.json", FILES).get("prompt_template")
    # a list, since what a file says need not be hashable
    if known is not None and known not in list(TEMPLATES):
        raise BadInput(
            f"{folder}/config.json: prompt_template = {known!r:.60} is not one of "
            f"{', '.join(TEMPLATES)}"
        )
    name = template if template != "auto" else known or choose_template(encoding, ends)
    turn_end = TEMPLATES[name][1]
    if turn_end in encoding.special_tokens_set:
        ends = tuple(dict.fromkeys((*ends, encoding.encode_single_token(turn_end))))
    if not 1 <= len(ends) <= 4:
        raise BadInput(
            f"{folder}: with config.json, generation_config.json and the template {name} "
            f"{len(ends)} tokens end a completion; "
            "the sampler wants 1 to 4: correct eos_token_id"
        )
    return with_template(encoding, name), ends


def model_folder(folder):
    """Where the model of a folder is: in it, or in its model/ if it is a run's. BadInput for what
    is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(
            f"--init {folder}: there is no such folder; nothing is downloaded here: get a model "
            "first, say with `hf download "
            "Qwen/Qwen2.5-0.5B --local-dir FOLDER`"
        )
    if (folder / "metrics.jsonl").exists() and not (folder / "model").is_dir():
        raise BadInput(f"--init {folder}: this run has not saved a model yet")
    return folder / "model" if (folder / "model" / "config.json").exists() else folder


def open_shape(folder, template="auto"):
    """All of a model but its weights -> (ModelConfig that knows what ends completions, encoding
    with its `template`). BadInput also for a tokenizer with more ids than the model has."""
    config, (encoding, ends) = read_config(folder), open_tokenizer(folder, template)
    if max(encoding.max_token_value, *ends) >= config.vocab_size:
        raise BadInput(
            f"{folder}: the tokenizer or eos_token_id has ids up to "
            f"{max(encoding.max_token_value, *ends)}, the model only "
            f"{config.vocab_size} rows"
        )
    return replace(config, end_tokens=ends), encoding


def open_weights(folder, config, encoding, compute, device):
    """The rest -> GPT with the config and the template of `open_shape`. BadInput for whatever
    weights.load_model refuses."""
    model = GPT.from_pretrained(folder, compute, device)
    model.config, model.prompt_template = config, encoding.template_name
    return model


def main():
    if len(sys.argv) != 3:
        raise BadInput("usage: python prompts.py FOLDER QUESTION")
    encoding, ends = open_tokenizer(model_folder(sys.argv[1]))
    ids = encoding.template(sys.argv[2])
    print(
        f"template {encoding.template_name}, {len(ids)} tokens; a completion ends with "
        f"{' or '.join(encoding.decode([end]) for end in ends)}"
    )
    print(" ".join(repr(encoding.decode([i])) for i in ids))


if __name__ == "__main__":
    guarded(main)
