"""The byte-level BPE tokenizer of a Hugging Face model, converted to a tiktoken.Encoding.

    encoding = convert("path/to/Qwen2.5-Math-1.5B")      # also Llama-3, GPT-2, SmolLM2

The idea. Byte-pair encoding needs three things: a pattern that cuts text into pieces, a rank for
every known string of bytes, and some special tokens. tiktoken has one number as rank and id, and
the original has a list of merges. Both cut text alike under a condition, which `check_merges`
checks token by token; a tokenizer that fails it is refused.

`encode_ordinary` never makes a special token from text, so neither a problem nor a model can forge
an end.
"""

import itertools
import unicodedata
from pathlib import Path

import regex  # the library that tiktoken cuts with
import tiktoken

from runtime.flags import BadInput, check_fields, is_a, read_json, reading

# Patterns of tokenizers whose files name them by a class or a flag.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same, with every digit cut off first: SmolLM2
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# For folders without a tokenizer.json: pattern, and whether text is put into NFC.
CLASSES = {"Qwen2Tokenizer": (QWEN2, True), "GPT2Tokenizer": (GPT2, False)}
FILES = "a tokenizer is tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json"


class Converted(tiktoken.Encoding):
    """A tiktoken.Encoding that treats three details as the original does.

    It applies NFC where the original does. It drops bytes that the vocabulary lacks (SmolLM2's
    lacks some). It decodes ids outside of the vocabulary to a replacement character, since models
    have more logits than tokens: rows of padding. `opening`: ids before every text.
    """

    def __init__(self, *args, nfc=False, opening=(), **keywords):
        super().__init__(*args, **keywords)
        self.nfc, self.opening = nfc, [self._special_tokens[token] for token in opening]
        self.bytes_of = {number: text for text, number in self._mergeable_ranks.items()}
        self.bytes_of |= {number: text.encode() for text, number in self._special_tokens.items()}
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in self._mergeable_ranks)

    def encode_ordinary(self, text):
        """Text -> token ids, none special. BadInput for a text that tiktoken cannot encode."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        try:
            if not any(b in self.lacking for b in text.encode("utf-8", "replace")):
                return super().encode_ordinary(text)
            ids = []
            # The vocabulary lacks some bytes of this text: they are dropped from each piece, as the
            # original does.
            for piece in regex.findall(self._pat_str, text):
                known = piece.encode().translate(None, self.lacking)
                ids += self._encode_single_piece(known) if known else []
            return ids
        except BaseException as error:  # tiktoken's Rust code panics at a million spaces, say
            if type(error).__name__ != "PanicException":
                raise
            raise BadInput(
                f"tiktoken cannot encode a text of {len(text):,} characters that begins "
                f"{text[:40]!r}"
            ) from None

    def decode(self, tokens, errors="replace"):
        known = (self.bytes_of.get(token, "\ufffd".encode()) for token in tokens)
        return b"".join(known).decode("utf-8", errors)


def byte_of():
    """GPT-2's alphabet -> {character: the byte it stands for}. Printable bytes stand for
    themselves; the others are the characters 256, 257, ..."""
    # GPT-2 wrote bytes as visible characters, so that its vocabulary is a text file.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def convert(folder):
    """A folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json ->
    Converted.

    Raises BadInput that names what tiktoken cannot do in the same way: another model than
    byte-level BPE, another normaliser, several cuts in sequence, or merges that it would apply in
    another order (`check_merges`).
    """
    folder = Path(folder)
    with reading(f"{folder}: its tokenizer"):
        if (folder / "tokenizer.json").exists():
            parts = from_tokenizer_json(folder)
        else:
            parts = from_vocab_and_merges(folder)
        vocabulary, merges, added, ignore_merges, keywords = parts
        check_ids(vocabulary, added, folder)
        alphabet = byte_of()
        # A token that is not written in the alphabet of bytes is a special one.
        added |= {
            text: number for text, number in vocabulary.items() if not alphabet.keys() >= set(text)
        }
        # Back from the alphabet to bytes. The original's id is tiktoken's rank.
        ranks = {
            bytes(alphabet[c] for c in text): number
            for text, number in vocabulary.items()
            if text not in added
        }
        # Older files have "a b", newer ones ["a", "b"].
        halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        pairs = [tuple(bytes(alphabet[c] for c in part) for part in half) for half in halves]
        check_merges(ranks, pairs, folder, ignore_merges)
        return Converted(str(folder), mergeable_ranks=ranks, special_tokens=added, **keywords)


def from_tokenizer_json(folder):
    """-> vocabulary {text: id}, merges, added tokens {text: id}, whether the original looks whole
    pieces up before it merges, and keywords for Converted."""
    path = folder / "tokenizer.json"
    content = read_json(path, FILES)
    model = content["model"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    pattern = pattern_of(steps_of(content, "pre_tokenizer", "pretokenizers", folder), folder)
    nfc = uses_nfc(steps_of(content, "normalizer", "normalizers", folder), folder)
    opening = tokens_before(steps_of(content, "post_processor", "processors", folder), folder)
    flags = {name: bool for name in ("byte_fallback", "ignore_merges") if name in model}
    check_fields(model, dict(vocab=dict, merges=list) | flags, f"{path}: its model")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise BadInput(
            f"{path}: model {model.get('type')} is not byte-level BPE, which is all that is "
            "converted here"
        )
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise BadInput(f"{path}: {field} = {model[field]!r:.60} has no counterpart in tiktoken")
    keywords = dict(pat_str=pattern, nfc=nfc, opening=opening)
    return model["vocab"], model["merges"], added, bool(model.get("ignore_merges")), keywords


def from_vocab_and_merges(folder):
    """The same from vocab.json, merges.txt and tokenizer_config.json, for the CLASSES."""
    config = read_json(folder / "tokenizer_config.json", FILES)
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind not in CLASSES:
        raise BadInput(
            f"{folder}: without a tokenizer.json only {', '.join(CLASSES)} are known, not {kind}"
        )
    decoder = config.get("added_tokens_decoder", {})
    added = {token["content"]: int(number) for number, token in decoder.items()}
    vocabulary = read_json(folder / "vocab.json", FILES)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pattern, nfc = CLASSES[kind]
    return (
        vocabulary,
        [line for line in lines if line],
        added,
        False,
        dict(pat_str=pattern, nfc=nfc),
    )


def check_ids(vocabulary, added, folder):
    """Raises BadInput unless every token, {text: id}, has an id of its own. An added token may
    stand in the vocabulary too, with the same id."""
    for text, number in [*vocabulary.items(), *added.items()]:
        if not text or not is_a(number, int) or not 0 <= number < 1 << 31:
            raise BadInput(
                f"{folder}: its tokenizer's token {text!r:.60} has the id {number!r:.60}, which is "
                "not a token id"
            )
    # In both directions: no id has two texts, and no text two ids.
    texts = {}
    for text, number in [*vocabulary.items(), *added.items()]:
        if texts.setdefault(number, text) != text or vocabulary.get(text, number) != number:
            raise BadInput(
                f"{folder}: its tokenizer gives the token {text!r:.60} the id {number}, and also "
                f"{texts[number]!r:.60}"
            )


def steps_of(content, field, inner, folder):
    """The steps of a part of tokenizer.json: none, one, or those of a sequence, which stand under
    `inner` -> [dict with "type", ...]."""
    part = content.get(field)
    steps = [] if part is None else part[inner] if part["type"] == "Sequence" else [part]
    flags = ("add_prefix_space", "use_regex", "individual_digits", "invert")
    for step in steps:
        kinds = dict(type=str) | {name: bool for name in flags if name in step}
        check_fields(step, kinds, f"{folder}/tokenizer.json: a step of its {field}")
    return steps


def tokens_before(steps, folder):
    """The special tokens that post-processors put before a single text: Llama-3's
    <|begin_of_text|>. Raises BadInput for others than templates."""
    for step in steps:
        # ByteLevel's is about offsets, which are not used here
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise BadInput(
                f"{folder}/tokenizer.json: the post-processor {step['type']} is not known here; "
                "only TemplateProcessing is"
            )
        if step["type"] == "TemplateProcessing":
            single = [piece.popitem() for piece in step["single"]]  # [(kind, {"id": ...}), ...]
            # The special tokens in front of the first text.
            texts = [i for i, (kind, _) in enumerate(single) if kind == "Sequence"]
            return [token["id"] for kind, token in single[: texts[0]] if kind == "SpecialToken"]
    return []


def uses_nfc(steps, folder):
    """Whether text is put into NFC first. Raises BadInput for other normalisers."""
    for step in steps:
        if step["type"] != "NFC":
            raise BadInput(
                f"{folder}/tokenizer.json: the normaliser {step['type']} is not known here; only "
                "NFC is"
            )
    return bool(steps)


def pattern_of(steps, folder):
    """The pre-tokenizer's steps -> one pattern that cuts text in the same places. Raises BadInput
    where there is none."""
    kinds = [step["type"] for step in steps]
    # The sequences of steps that are one pattern. ByteLevel comes last, and may cut like GPT-2
    # itself.
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        first, last = steps[0], steps[-1]
        cuts_as_gpt2 = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and cuts_as_gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and cuts_as_gpt2:
            return GPT2_DIGITS
        if kinds == ["Split", "ByteLevel"] and not cuts_as_gpt2:
            regex_is_kept = first["behavior"] == "Isolated" and not first["invert"]
            if "Regex" in first["pattern"] and regex_is_kept:
                return first["pattern"]["Regex"]
    raise BadInput(
        f"{folder}/tokenizer.json: text is cut by {' then '.join(kinds) or 'nothing'}, which is "
        "not one pattern: joined into one it would cut in other places"
    )


def check_merges(ranks, pairs, folder, ignore_merges=False):
    """Raises BadInput, naming the first bad merge, unless tiktoken merges in the original's order.

    tiktoken has one number as rank and id, and looks a whole piece up before it merges. Both agree
    if products of merges rise in id, and if every token of several bytes, merged with lower ranks
    alone, ends as exactly the two parts of its merge. With ignore_merges, Llama-3's way, the
    original looks whole pieces up too. Its merges were made from tiktoken's ranks and hold every
    way to cut a token in two, so a product may come several times in a row, and a token without a
    merge is fine if tiktoken cannot make it from parts either.
    """
    cuts, last = {}, -1
    for a, b in pairs:
        if not (ignore_merges or (a in ranks and b in ranks)):
            raise BadInput(
                f"{folder}: the merge {a!r} + {b!r} has a part that is no token of its tokenizer"
            )
        # Ids must rise. With ignore_merges a product may repeat, so they may also stay the same.
        if ranks.get(a + b, -1) < last + (not ignore_merges):
            raise BadInput(
                f"{folder}: the merge {a!r} + {b!r} has id {ranks.get(a + b)}, after one with id "
                f"{last}: tiktoken would merge in another order"
            )
        last = ranks[a + b]
        cuts.setdefault(a + b, []).append((a, b))
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        # With what comes before it, the token must end as the two parts that its merge names.
        parts = tuple(merged(token, ranks, rank))
        unreachable = ignore_merges and token not in cuts and len(parts) > 2
        if parts not in cuts.get(token, ()) and not unreachable:
            raise BadInput(
                f"{folder}: the token {token!r} is made of {parts} by tiktoken, of "
                f"{cuts.get(token)} by its merges"
            )


def merged(token, ranks, below):
    """The parts that byte-pair merging leaves of `token` when it may make only products of rank
    < `below`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = enumerate(itertools.pairwise(parts))
        # The pair of the lowest rank, and of equal ones the leftmost, as in tiktoken.
        best, i = min((ranks.get(a + b, below), i) for i, (a, b) in pairs)
        if best >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
