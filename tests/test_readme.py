"""README against the code: what it says of files and commands must stay true."""
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_flags import SCRIPTS, config_of

from flags import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_file_is_listed_with_its_length():
    """Catches a file that a reader is not told of, and a line count more than a tenth off."""
    listed = {name: int(lines) for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M)}
    there = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert listed.keys() == there.keys()
    assert [name for name in there if abs(listed[name] - there[name]) > 0.1 * there[name]] == []


def commands():
    """Every `python script.py ...` and `torchrun ... script.py ...` in README and in the opening docstrings."""
    texts = [README, *(path.read_text().split('"""')[1] for path in ROOT.glob("*.py"))]
    return sorted({found.strip() for text in texts for found in re.findall(r"(?:python|torchrun[^\n`]*?) (\w+\.py(?: +--?[^\n#`|&)']+)?)", text)})


@pytest.mark.parametrize("command", commands())
def test_every_command_names_real_flags(command):
    """Catches a documented flag that was renamed."""
    script, *words = shlex.split(command)
    assert (ROOT / script).exists()
    if words and script.removesuffix(".py") in SCRIPTS and "--help" not in words:
        parse(config_of(script.removesuffix(".py")), words)


def test_links_lead_somewhere():
    """Catches a link to a file that moved."""
    assert [link for link in re.findall(r"\]\((?!http)([^)#]+)", README) if not (ROOT / link).exists()] == []


def test_mgrpo_lines_are_marked():
    """Catches README's grep showing nothing: what GRPO would not have is marked in the rollout, the loop and the advantages."""
    assert all((ROOT / name).read_text().count("MGRPO:") >= 2 for name in ("mgrpo.py", "train.py"))


def test_nothing_is_left_to_fill_in():
    """Catches a placeholder that was never replaced, in any tracked text."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split() or ["README.md"]
    marks = ("@" * 2, "TO" + "DO", "FIX" + "ME")
    texts = [(name, (ROOT / name).read_text(errors="ignore")) for name in tracked if name.endswith((".py", ".md", ".txt")) and (ROOT / name).exists()]
    assert [(name, mark) for name, text in texts for mark in marks if mark in text] == []
