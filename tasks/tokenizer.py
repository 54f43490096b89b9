"""The tokenizer of the built-in tasks: a tiktoken.Encoding that is built in memory.

    python -m tasks.tokenizer "x in {3, 8}, (x*4)+7 = 6 (mod 11)"      # shows the tokens of a text

The idea. The vocabulary starts with the 256 bytes, so any text encodes and decodes exactly. It adds
the strings that the tasks use all the time: the numbers 10..99, the tags of the answer format, a
few words, and each guiding phrase whole. A small model then sees `7+8=4` as five symbols with a
meaning, and learns arithmetic many times faster than from bytes.

The token that ends a completion is `<|endoftext|>` (tiktoken's `eot_token`). `encode_ordinary`
never makes it from text, so neither a problem nor a model can forge an end.
"""

import re
import sys

import tiktoken

from mgrpo import PHRASES
from runtime.flags import guarded

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# What the tasks write between numbers. Single characters ("+", "(", "x", "\n") are bytes already.
# A new task adds its words here; a base made before then has another vocabulary and is made anew.
WORDS = (
    "x in {",
    ", ",
    "}, ",
    " = ",
    " (mod ",
    "off by ",
    ": yes",
    ": no. ",
    "again: ",
    "make ",
    " from ",
)


def build_encoding():
    """-> tiktoken.Encoding of 256 bytes, the numbers 10..99, tags, words, phrases, and the end
    token."""
    strings = [str(n) for n in range(10, 100)] + [*TAGS, *WORDS, *PHRASES]
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {s.encode(): 256 + i for i, s in enumerate(strings)}
    # The pattern cuts each string out as one piece, and a piece with a rank is one token. An
    # alternation takes its first branch that fits: hence a phrase before the words inside it, and
    # a number as at most two digits ("123" is 12, 3).
    longest_first = sorted([*TAGS, *WORDS, *PHRASES], key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), "[0-9]{1,2}", r"[\s\S]"])
    return tiktoken.Encoding(
        "nano-mgrpo",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


def main():
    """Prints the tokens of the text on the command line."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return
    encoding = build_encoding()
    text = " ".join(sys.argv[1:]) or PHRASES[1]
    ids = encoding.encode_ordinary(text)
    print(f"{encoding.n_vocab} tokens in the vocabulary; this text is {len(ids)}:")
    print(" ".join(repr(encoding.decode([i])) for i in ids))


if __name__ == "__main__":
    guarded(main)
