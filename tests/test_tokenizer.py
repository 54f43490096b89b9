"""Converted tokenizers against the `tokenizers` library, token for token; and what must be
refused."""

import base64
import json
import random
import unicodedata

import pytest
from conftest import SHARED

from huggingface.tokenizer import QWEN2, byte_of, check_merges, convert, merged
from runtime.flags import BadInput

FILES = SHARED / "tokenizers"
needs_shared = pytest.mark.skipif(not FILES.exists(), reason="needs ../shared/tokenizers")


def odd_strings(count, seed=0):
    """Strings that tokenizers disagree about: spaces, newlines, digits, contractions, combining
    marks, all of Unicode."""
    rng = random.Random(seed)
    bits = [
        "'s",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "12",
        "0",
        "٣",
        "é",
        "e\u0301",
        "ﬁ",
        "中文",
        "👍🏽",
        "\u200d",
        "x=1",
        "<b>",
        "Hello",
        " world",
        "the",
        "!!",
        "\u3000",
    ]
    draw = lambda: rng.choice(
        [
            *bits,
            chr(
                rng.choice(
                    [
                        rng.randrange(32, 127),
                        rng.randrange(160, 0xD800),
                        rng.randrange(0xE000, 0x110000),
                    ]
                )
            ),
        ]
    )
    return ["".join(draw() for _ in range(rng.randint(0, 14))) for _ in range(count)]


def small(tmp_path, pretokenizer, normalizer=None, name="tok"):
    """A BPE trained here by the `tokenizers` library on a few sentences -> (library's tokenizer,
    folder)."""
    tokenizers = pytest.importorskip(
        "tokenizers",
        reason="needs tokenizers (comes with transformers): pip install -r requirements-extra.txt",
    )
    original = tokenizers.Tokenizer(tokenizers.models.BPE())
    original.pre_tokenizer, original.decoder = (
        pretokenizer(tokenizers),
        tokenizers.decoders.ByteLevel(),
    )
    if normalizer:
        original.normalizer = normalizer(tokenizers)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    original.train_from_iterator(
        odd_strings(3000, 1) + ["the world is 12 and the word's 120 here"] * 50, trainer
    )
    original.add_special_tokens(["<|endoftext|>"])
    (tmp_path / name).mkdir()
    original.save(str(tmp_path / name / "tokenizer.json"))
    return original, tmp_path / name


CUTS = {
    "gpt2": lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": lambda t: t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Digits(individual_digits=True),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen2": lambda t: t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(QWEN2), "isolated"),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.extra
@pytest.mark.parametrize("cut", CUTS)
def test_converted_tokenizers_give_the_librarys_ids(cut, tmp_path):
    """Catches another pattern, NFC forgotten, merges in another order: 4,000 odd strings give the
    library's ids and come back as they were."""
    original, folder = small(
        tmp_path, CUTS[cut], (lambda t: t.normalizers.NFC()) if cut == "qwen2" else None
    )
    encoding = convert(folder)
    for text in odd_strings(4000, 2):
        ids = encoding.encode_ordinary(text)
        assert ids == original.encode(text, add_special_tokens=False).ids, ascii(text)
        assert encoding.decode(ids) == (
            unicodedata.normalize("NFC", text) if cut == "qwen2" else text
        )
    assert encoding.eot_token == original.token_to_id("<|endoftext|>")
    assert encoding.eot_token not in encoding.encode_ordinary("<|endoftext|>")


@pytest.mark.extra
@needs_shared
def test_a_tokenizer_json_of_others_gives_the_librarys_ids():
    """Catches a converter that only knows its own files: tokenizer.json of ../shared against the
    library."""
    tokenizers = pytest.importorskip("tokenizers")
    encoding, original = (
        convert(FILES / "tiny_qwen_like"),
        tokenizers.Tokenizer.from_file(str(FILES / "tiny_qwen_like/tokenizer.json")),
    )
    for text in odd_strings(4000, 3):
        assert encoding.encode_ordinary(text) == original.encode(text).ids, ascii(text)
    assert (
        encoding.n_vocab == 2004
        and encoding.decode([0, 999_999]) == encoding.decode([0]) + "\ufffd"
    )


@needs_shared
def test_vocab_and_merges_give_what_tokenizer_json_gives(tmp_path):
    """Catches the first merge taken for a comment, or the comment for a merge: vocab.json +
    merges.txt give what tokenizer.json gives."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((FILES / "tiny_qwen_like" / name).read_bytes())
    added = {
        str(token["id"]): token
        for token in json.loads((FILES / "tiny_qwen_like/tokenizer.json").read_text())[
            "added_tokens"
        ]
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="Qwen2TokenizerFast", added_tokens_decoder=added))
    )
    ours, whole = convert(tmp_path), convert(FILES / "tiny_qwen_like")
    for text in odd_strings(1500, 4):
        assert ours.encode_ordinary(text) == whole.encode_ordinary(text)


@pytest.mark.slow
@needs_shared
def test_valid_merges_are_accepted():
    """Catches a validity test that refuses what is valid: GPT-2's 50,000 merges hold, and so do
    10,000 of Qwen's ranks against themselves."""
    alphabet = byte_of()
    vocabulary = json.loads((FILES / "gpt2/encoder.json").read_text())
    ranks = {
        bytes(alphabet[c] for c in text): number
        for text, number in vocabulary.items()
        if text != "<|endoftext|>"
    }
    lines = (FILES / "gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    check_merges(
        ranks,
        [
            tuple(bytes(alphabet[c] for c in part) for part in line.split(" "))
            for line in lines
            if line
        ],
        "gpt2",
    )
    qwen = {
        base64.b64decode(text): int(rank)
        for text, rank in map(str.split, (FILES / "qwen/qwen.tiktoken").read_text().splitlines())
    }
    assert all(len(merged(token, qwen, qwen[token])) == 2 for token in list(qwen)[256:10_000])


A = {bytes([b]): i for i, b in enumerate(b"abc")}


@pytest.mark.parametrize(
    "ranks, pairs, says",
    [
        (A | {b"bc": 3, b"ab": 4}, [(b"a", b"b"), (b"b", b"c")], "in another order"),
        (A | {b"ab": 3, b"abc": 4}, [(b"a", b"b")], "abc"),
        (A | {b"ab": 3, b"bc": 4, b"abc": 5}, [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")], "abc"),
    ],
)
def test_merges_in_another_order_are_refused(ranks, pairs, says):
    """Catches the toy cases in which both libraries cut `abc` differently: ids out of order, a
    token without a merge, another pair."""
    with pytest.raises(BadInput, match=says):
        check_merges(ranks, pairs, "toy")


def test_tokens_without_a_merge_need_ignore_merges():
    """Catches Llama-3's tokens without a merge refused, where no merge can make them from parts; and
    accepted where tiktoken would: of abcd it makes [abc, d], the original [ab, c, d]."""
    check_merges(A | {b"abc": 4}, [], "toy", ignore_merges=True)
    with pytest.raises(BadInput, match="abc"):
        check_merges(A | {b"ab": 3, b"abc": 4}, [(b"a", b"b")], "toy", ignore_merges=True)
    check_merges(
        A | {b"ab": 3, b"abc": 4},
        [(b"a", b"b"), (b"a", b"bc"), (b"ab", b"c")],
        "toy",
        ignore_merges=True,
    )


@pytest.mark.extra
@needs_shared
def test_llama3s_repeated_merges_are_accepted(tmp_path):
    """Catches Llama-3 refused: its tokenizer.json lists EVERY way to cut a token in two, so
    products come several times, and begins each text with a token. Made here from 4,000 of Qwen's
    ranks, with Llama-3's pattern; token for token against the library."""
    tokenizers = pytest.importorskip("tokenizers")
    pattern = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    ranks = {
        base64.b64decode(text): int(rank)
        for text, rank in list(
            map(str.split, (FILES / "qwen/qwen.tiktoken").read_text().splitlines())
        )[:4256]
    }
    letter = {byte: char for char, byte in byte_of().items()}
    spell = lambda text: "".join(letter[b] for b in text)
    merges = [
        f"{spell(token[:i])} {spell(token[i:])}"
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    begin = dict(
        id=len(ranks),
        content="<|begin_of_text|>",
        special=True,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
    )
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    whole = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[begin],
        normalizer=None,
        decoder=byte_level,
        pre_tokenizer=dict(
            type="Sequence",
            pretokenizers=[
                dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False),
                byte_level,
            ],
        ),
        post_processor=dict(
            type="Sequence",
            processors=[
                byte_level,
                dict(
                    type="TemplateProcessing",
                    single=[
                        dict(SpecialToken=dict(id="<|begin_of_text|>", type_id=0)),
                        dict(Sequence=dict(id="A", type_id=0)),
                    ],
                    pair=[],
                    special_tokens={
                        "<|begin_of_text|>": dict(
                            id="<|begin_of_text|>", ids=[len(ranks)], tokens=["<|begin_of_text|>"]
                        )
                    },
                ),
            ],
        ),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=True,
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=merges,
        ),
    )
    assert len(merges) > 1.5 * len(ranks)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    encoding, original = (
        convert(tmp_path),
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    for text in [*odd_strings(3000, 5), "In 1,234,567 years 12345 apples  cost $3.50, don't they?"]:
        assert encoding.opening + encoding.encode_ordinary(text) == original.encode(text).ids, (
            ascii(text)
        )


@pytest.mark.extra
def test_bytes_that_the_vocabulary_lacks_are_dropped(tmp_path):
    """Catches a panic in tiktoken's Rust code, which no `except Exception` sees, for a control
    character in a question: SmolLM2's vocabulary lacks bytes, and the original drops them. Also a
    text that tiktoken cannot take: one sentence."""
    original, folder = small(tmp_path, CUTS["smollm2"])
    whole = json.loads((folder / "tokenizer.json").read_text())
    letter = {byte: char for char, byte in byte_of().items()}
    merged_bytes = {
        letter for token in whole["model"]["vocab"] if len(token) > 1 for letter in token
    }
    for byte in (8, *range(0xF1, 0x100)):  # those that no merge needs, as in SmolLM2's
        if letter[byte] not in merged_bytes:
            del whole["model"]["vocab"][letter[byte]]
    assert len(whole["model"]["vocab"]) < 600 and letter[8] not in whole["model"]["vocab"]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    encoding, original = convert(folder), type(original).from_file(str(folder / "tokenizer.json"))
    for text in ["a \x08oxed{1}\x08", "\x08", "the \x08world", "\U000f0000", *odd_strings(2000, 6)]:
        assert encoding.encode_ordinary(text) == original.encode(text).ids, ascii(text)
    with pytest.raises(BadInput, match="cannot encode a text of 2,000,000"):
        encoding.encode_ordinary(" " * 2_000_000)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(normalizer=dict(type="NFKC")), "NFKC"),
        (dict(model=dict(type="Unigram", vocab={}, merges=[])), "Unigram"),
        (
            dict(
                pre_tokenizer=dict(
                    type="Sequence",
                    pretokenizers=[dict(type="Split"), dict(type="Split"), dict(type="ByteLevel")],
                )
            ),
            "Split then Split then ByteLevel",
        ),
        (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)), "not one pattern"),
        (dict(pre_tokenizer=None), "cut by nothing"),
    ],
)
def test_unsupported_tokenizers_are_refused(change, says, tmp_path):
    """Catches a tokenizer that is nearly converted."""
    whole = (
        dict(
            pre_tokenizer=dict(type="ByteLevel", use_regex=True),
            model=dict(type="BPE", vocab={}, merges=[]),
        )
        | change
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(BadInput, match=says):
        convert(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    """Catches a traceback for a folder without a tokenizer, and for JSON that is none."""
    with pytest.raises(BadInput, match="there is no such file"):
        convert(tmp_path)
    for text, says in (
        ("[", "is not JSON"),
        ("{}", "damaged"),
        ("[1]", "damaged"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["▁ a"]}}', "cut by"),
    ):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=says):
            convert(tmp_path)
