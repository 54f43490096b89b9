"""The tokenizer, a tiktoken.Encoding in every case: built in memory for our own tasks, or converted
from a Hugging Face model's files.

    python tokenizer.py "x in {3, 8}, (x*4)+7 = 6 (mod 11)"      # shows how a text is cut

The idea. Byte-pair encoding needs three things: a pattern that cuts text into pieces, a rank for
every known string of bytes, and some special tokens. The ground here is the 256 bytes, so ANY text
encodes and decodes exactly. On top stand strings that our tasks use all the time: the numbers
10..99, the tags of the answer format, a few words, and each guiding phrase whole. The pattern cuts
those strings out as pieces of their own, and a piece that has a rank is one token. A small model
then sees `7+8=4` as five symbols that mean something, and learns arithmetic many times faster than
from bytes.

The end-of-answer token is `<|endoftext|>` (tiktoken's `eot_token`). `encode_ordinary` never
produces it from text, so neither a problem nor a model can forge an end.

`convert` reads the byte-level BPE of Qwen, Llama-3, GPT-2 and SmolLM2. tiktoken cuts text as the
original library does under a condition, which is checked token by token before the result is
trusted.
"""

import itertools
import unicodedata
from pathlib import Path

import regex  # which tiktoken cuts with, too
import tiktoken

from runtime.flags import BadInput, check_fields, is_a, read_json, reading

# ---- Hugging Face's byte-level BPE ---------------------------------------------------------------

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# every digit cut off first: SmolLM2
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FILES = "a tokenizer is tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json"
# without a tokenizer.json: pattern, whether NFC
CLASSES = {"Qwen2Tokenizer": (QWEN2, True), "GPT2Tokenizer": (GPT2, False)}


class Converted(tiktoken.Encoding):
    """A tiktoken.Encoding that applies NFC where the original does, drops bytes that the vocabulary
    lacks (SmolLM2's lacks some) as the original does, and decodes ids that are not in the
    vocabulary to a replacement character (models have more logits than tokens: rows of padding).
    `opening`: ids that the original puts before every text."""

    def __init__(self, *args, nfc=False, opening=(), **keywords):
        super().__init__(*args, **keywords)
        self.nfc, self.opening = nfc, [self._special_tokens[token] for token in opening]
        self.bytes_of = {number: text for text, number in self._mergeable_ranks.items()}
        self.bytes_of |= {number: text.encode() for text, number in self._special_tokens.items()}
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in self._mergeable_ranks)

    def encode_ordinary(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        try:
            if not any(b in self.lacking for b in text.encode("utf-8", "replace")):
                return super().encode_ordinary(text)
            pieces = [
                piece.encode().translate(None, self.lacking)
                for piece in regex.findall(self._pat_str, text)
            ]
            return [
                token for piece in pieces if piece for token in self._encode_single_piece(piece)
            ]
        except BaseException as error:  # tiktoken's Rust code panics at a million spaces, say
            if type(error).__name__ != "PanicException":
                raise
            raise BadInput(
                f"tiktoken cannot encode a text of {len(text):,} characters that begins "
                f"{text[:40]!r}"
            ) from None

    def decode(self, tokens, errors="replace"):
        return b"".join(self.bytes_of.get(token, "\ufffd".encode()) for token in tokens).decode(
            "utf-8", errors
        )

    def decode_batch(self, batch, **_):
        return [self.decode(tokens) for tokens in batch]


def byte_of():
    """GPT-2's alphabet: {character: the byte it stands for}. Printable bytes stand for themselves;
    the others are 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def convert(folder):
    """A folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json ->
    Converted.

    BadInput names what tiktoken cannot do in the same way: another model than byte-level BPE,
    another normaliser, several cuts in sequence, or merges that it would apply in another order
    (`check_merges`). What is not written in the bytes' alphabet is an added token.
    """
    with reading(f"{folder}: its tokenizer"):
        return converted(Path(folder))


def converted(folder):
    """What `convert` does, for files that are as they should be."""
    if (folder / "tokenizer.json").exists():
        whole = read_json(folder / "tokenizer.json", FILES)
        model, added = (
            whole["model"],
            {token["content"]: token["id"] for token in whole.get("added_tokens", ())},
        )
        pattern = pattern_of(steps_of(whole, "pre_tokenizer", "pretokenizers", folder), folder)
        nfc = uses_nfc(steps_of(whole, "normalizer", "normalizers", folder), folder)
        opening = tokens_before(steps_of(whole, "post_processor", "processors", folder), folder)
        flags = {name: bool for name in ("byte_fallback", "ignore_merges") if name in model}
        check_fields(
            model, dict(vocab=dict, merges=list) | flags, f"{folder}/tokenizer.json: its model"
        )
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise BadInput(
                f"{folder}/tokenizer.json: model {model.get('type')} is not byte-level BPE, which "
                "is all that is converted here"
            )
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise BadInput(
                    f"{folder}/tokenizer.json: {field} = {model[field]!r:.60} has no place in "
                    "tiktoken's way"
                )
        vocabulary, merges = model["vocab"], model["merges"]
    else:
        config = read_json(folder / "tokenizer_config.json", FILES)
        kind = str(config.get("tokenizer_class")).removesuffix("Fast")
        if kind not in CLASSES:
            raise BadInput(
                f"{folder}: without a tokenizer.json only {', '.join(CLASSES)} are known, not "
                f"{kind}"
            )
        added = {
            token["content"]: int(number)
            for number, token in config.get("added_tokens_decoder", {}).items()
        }
        (pattern, nfc), model, opening, vocabulary = (
            CLASSES[kind],
            {},
            (),
            read_json(folder / "vocab.json", FILES),
        )
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [
            line
            for i, line in enumerate(lines)
            if line and not (i == 0 and line.startswith("#version"))
        ]
    check_ids(vocabulary, added, folder)
    alphabet = byte_of()
    added |= {
        text: number for text, number in vocabulary.items() if not alphabet.keys() >= set(text)
    }
    ranks = {
        bytes(alphabet[c] for c in text): number
        for text, number in vocabulary.items()
        if text not in added
    }
    halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    pairs = [tuple(bytes(alphabet[c] for c in part) for part in half) for half in halves]
    check_merges(ranks, pairs, folder, bool(model.get("ignore_merges")))
    return Converted(
        str(folder),
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens=added,
        nfc=nfc,
        opening=opening,
    )


def check_ids(vocabulary, added, folder):
    """BadInput unless every token, {text: id}, has an id of its own; an added token may stand in
    the vocabulary too, with the same id."""
    for text, number in [*vocabulary.items(), *added.items()]:
        if not text or not is_a(number, int) or not 0 <= number < 1 << 31:
            raise BadInput(
                f"{folder}: its tokenizer's token {text!r:.60} has the id {number!r:.60}, which is "
                "not a token id"
            )
    texts = {}
    for text, number in [*vocabulary.items(), *added.items()]:
        if texts.setdefault(number, text) != text or vocabulary.get(text, number) != number:
            raise BadInput(
                f"{folder}: its tokenizer gives the token {text!r:.60} the id {number}, and also "
                f"{texts[number]!r:.60}"
            )


def steps_of(whole, field, inner, folder):
    """The steps of a part of tokenizer.json: none, one, or those of a sequence, which stand under
    `inner` -> [dict with "type", ...]."""
    part = whole.get(field)
    steps = [] if part is None else part[inner] if part["type"] == "Sequence" else [part]
    flags, where = (
        ("add_prefix_space", "use_regex", "individual_digits", "invert"),
        f"{folder}/tokenizer.json: a step of its {field}",
    )
    for step in steps:
        check_fields(step, dict(type=str) | {name: bool for name in flags if name in step}, where)
    return steps


def tokens_before(steps, folder):
    """The special tokens that post-processors put before a single text: Llama-3's
    <|begin_of_text|>. BadInput for others than templates."""
    for step in steps:
        # ByteLevel's is about offsets, which nobody asks for here
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise BadInput(
                f"{folder}/tokenizer.json: the post-processor {step['type']} is not known here; "
                "only TemplateProcessing is"
            )
        if step["type"] == "TemplateProcessing":
            single = [piece.popitem() for piece in step["single"]]
            texts = [i for i, (kind, _) in enumerate(single) if kind == "Sequence"]
            return [token["id"] for kind, token in single[: texts[0]] if kind == "SpecialToken"]
    return []


def uses_nfc(steps, folder):
    """Whether text is put into NFC first. BadInput for other normalisers."""
    for step in steps:
        if step["type"] != "NFC":
            raise BadInput(
                f"{folder}/tokenizer.json: the normaliser {step['type']} is not known here; only "
                "NFC is"
            )
    return bool(steps)


def pattern_of(steps, folder):
    """The pre-tokenizer's steps -> ONE pattern that cuts text in the same places. BadInput where
    there is none."""
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return GPT2
        if (
            kinds == ["Digits", "ByteLevel"]
            and steps[0].get("individual_digits")
            and steps[1].get("use_regex", True)
        ):
            return GPT2_DIGITS
        plain = len(steps) == 2 and kinds[0] == "Split" and not steps[1].get("use_regex", True)
        if (
            plain
            and "Regex" in steps[0]["pattern"]
            and steps[0]["behavior"] == "Isolated"
            and not steps[0]["invert"]
        ):
            return steps[0]["pattern"]["Regex"]
    raise BadInput(
        f"{folder}/tokenizer.json: text is cut by {' then '.join(kinds) or 'nothing'}, which is "
        "not one pattern: joined into "
        "one it would cut in other places"
    )


def check_merges(ranks, pairs, folder, ignore_merges=False):
    """BadInput, naming the first bad merge, unless tiktoken merges in the same order as the
    original.

    tiktoken has ONE number as rank and id, and looks a whole piece up before it merges. Both agree
    if products of merges rise in id, and if every token of several bytes, merged with lower ranks
    alone, ends as exactly the two parts of its merge. With ignore_merges, Llama-3's way, the
    original looks whole pieces up too; its merges were made from tiktoken's ranks and hold every
    way to cut a token in two, so a product may come several times in a row, and a token without a
    merge is fine if tiktoken cannot make it from parts either.
    """
    cuts, last = {}, -1
    for a, b in pairs:
        if not (ignore_merges or (a in ranks and b in ranks)):
            raise BadInput(
                f"{folder}: the merge {a!r} + {b!r} is of what its tokenizer has no token for"
            )
        if ranks.get(a + b, -1) < last + (not ignore_merges):
            raise BadInput(
                f"{folder}: the merge {a!r} + {b!r} has id {ranks.get(a + b)}, after one with id "
                f"{last}: tiktoken would merge "
                "in another order"
            )
        last = ranks[a + b]
        cuts.setdefault(a + b, []).append((a, b))
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = tuple(merged(token, ranks, rank))
            if parts not in cuts.get(token, ()) and not (
                ignore_merges and token not in cuts and len(parts) > 2
            ):
                raise BadInput(
                    f"{folder}: the token {token!r} is made of {parts} by tiktoken, of "
                    f"{cuts.get(token)} by its merges"
                )


def merged(token, ranks, below):
    """The parts that byte-pair merging leaves of `token` when only products of rank < `below`
    exist."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, i = min(
            (ranks.get(a + b, below), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        )
        if best >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
