"""The tokenizer: a tiktoken.Encoding built in memory, so that nothing is downloaded.

    python tokenizer.py "x in {3, 8}, (x*4)+7 = 6 (mod 11)"      # shows how a text is cut

The idea. Byte-pair encoding needs three things: a pattern that cuts text into pieces, a rank for every known string of bytes,
and some special tokens. The ground here is the 256 bytes, so ANY text encodes and decodes exactly. On top stand strings
that our tasks use all the time: the numbers 10..99, the tags of the answer format, a few words, and each guiding phrase
whole. The pattern cuts those strings out as pieces of their own, and a piece that has a rank is one token. A small model
then sees `7+8=4` as five symbols that mean something, and learns arithmetic many times faster than from bytes.

The end-of-answer token is `<|endoftext|>` (tiktoken's `eot_token`). `encode_ordinary` never produces it from text, so neither
a problem nor a model can forge an end.
"""
import re
import sys

import tiktoken

# The seven guiding phrases of MGRPO's layer 2 (as both public re-implementations give them; see mgrpo.py, unknown 1).
PHRASES = (
    "Where might I have gone wrong this time? Let me double-check carefully.",
    "Wait, let me double-check that.",
    "Wait a minute, let me make sure I didn't make a mistake.",
    "Hmm, let me think if there's another way to approach this problem.",
    "Wait, maybe I can think about it like this:",
    "Another thought: maybe I can",
    "But wait, let me just make sure I didn't miss anything in the original problem.",
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# What tasks.py writes between numbers. Single characters ("+", "(", "x", "\n") are bytes already.
WORDS = ("x in {", ", ", "}, ", " = ", " (mod ", "off by ", ": yes", ": no. ", "again: ", "make ", " from ")


def build_encoding():
    """-> tiktoken.Encoding of 256 bytes, the numbers 10..99, tags, words, phrases, and the end token.

    A phrase is matched before the words inside it, and a number as at most two digits ("123" is 12, 3), because an
    alternation takes its first branch that fits.
    """
    strings = [str(n) for n in range(10, 100)] + [*TAGS, *WORDS, *PHRASES]
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {s.encode(): 256 + i for i, s in enumerate(strings)}
    longest_first = sorted([*TAGS, *WORDS, *PHRASES], key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), "[0-9]{1,2}", r"[\s\S]"])
    return tiktoken.Encoding("nano-mgrpo", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def main():
    encoding = build_encoding()
    text = " ".join(sys.argv[1:]) or PHRASES[1]
    ids = encoding.encode_ordinary(text)
    print(f"{encoding.n_vocab} tokens in the vocabulary; this text is {len(ids)}:")
    print(" ".join(repr(encoding.decode([i])) for i in ids))


if __name__ == "__main__":
    main()
