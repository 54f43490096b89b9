"""Progress bars: how far, how fast, how long yet. On a terminal only; a pipe and `--quiet` see
none.

    python train.py              # bars for the base, the run, each phase of a step's sampling, and
                                 the tables
    python train.py --quiet      # no bars, and no line a step: what is measured and what goes wrong
                                 is said all the same

The idea. A bar is drawn by tqdm on stderr, so what a script prints can be piped without it. A
process has one screen, so whether it is to be quiet is a variable of this module (set by
`quieten`), and not an argument of everything between a script and its sampler. Phases that are over
in a second show nothing.
"""

import contextlib

from tqdm import tqdm

from runtime import distributed

DELAY = 1.0  # seconds before a phase is worth a bar
QUIET = []  # holds something when the script is to be quiet


def quieten(quiet):
    """Whether this process is to draw no bars from now on."""
    QUIET[:] = [True] * quiet


def bar(total, name, unit, **options):
    """-> a tqdm bar over `total` units; hidden on ranks above 0, in a pipe, and when quiet."""
    hidden = True if distributed.rank() > 0 or QUIET else None  # None: shown if stderr is a terminal
    return tqdm(total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, **options)


@contextlib.contextmanager
def rows_of(sampler, count, name):
    """Around calls of a sampler that make `count` rows together: a bar of how many of them have
    ended."""
    with bar(count, name, " rows", leave=False, delay=DELAY) as drawn:
        if drawn.disable:  # nobody looks, so nobody counts
            yield drawn
            return
        sampler.seen = lambda rows, ended: drawn.update(ended)
        try:
            yield drawn
        finally:
            sampler.seen = None
