"""Few shapes: sizes are rounded up, so that matrix products of the same shape come again.

    pytest tests/test_packing.py -k shapes

The idea. A library of matrix products compiles a kernel for every shape that it meets. On a CPU the
first product of a shape in bf16 takes 0.5 ms, the next one 0.05 ms, and the kernel stays in memory.
Rows that leave, trees and completions are of any size: a step of training would meet a hundred new
shapes, a tenth of its time. Rounded up, sizes come again. What pads them is computed and dropped;
no result depends on it.
"""

import os

# A compiled product takes half a megabyte: half of it in a cache of torch, half in one of oneDNN.
# Either would keep 1,024 of them. A step of training needs about 80. Where one process samples and
# trains, 256 were too few: training took a quarter longer.
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")  # torch's: what it forgets is soon made again
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


def rounded(size, sizes=4):
    """-> the next of so many sizes an octave (a power of two): 8, 10, 12, 14, 16, 20, 24 ..."""
    # 1,000 has 10 bits: there 4 sizes an octave are multiples of 2^(10 - 3), and it becomes 1,024.
    return size + -size % (1 << max(0, size.bit_length() - sizes.bit_length()))
