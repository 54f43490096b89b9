"""Decides whether two answers are the same. One door: verifier.equal(answer, gold) -> bool.

    python -m verifier.answers "\\frac12" 0.5

equal raises VerifierFailed when it reaches no verdict. It never evaluates model text in Python.
"""


def __getattr__(name):
    # Imported at the first use. At the top, `python -m verifier.answers` would find its module
    # imported already, and warn.
    if name not in ("equal", "VerifierFailed"):
        raise AttributeError(f"module 'verifier' has no attribute {name!r}")
    import verifier.answers

    return getattr(verifier.answers, name)
