"""README against the code: what it says of files and commands must stay true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import script
from test_flags import SCRIPTS, config_of

from runtime.flags import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CHAPTERS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def test_every_file_is_listed_with_its_length():
    """Catches a file that a reader is not told of, and a line count more than a tenth off."""
    listed = {
        name: int(lines)
        for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M)
    }
    there = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert listed.keys() == there.keys()
    assert [name for name in there if abs(listed[name] - there[name]) > 0.1 * there[name]] == []


def commands():
    """Every `python script.py ...` and `torchrun ... script.py ...` in README, its chapters and the
    opening docstrings."""
    texts = [
        README,
        *CHAPTERS.values(),
        *(path.read_text().split('"""')[1] for path in ROOT.glob("*.py")),
    ]
    return sorted(
        {
            found.strip()
            for text in texts
            for found in re.findall(
                r"(?:python|torchrun[^\n`]*?) (\w+\.py(?: +--?[^\n#`|&)']+)?)", text
            )
        }
    )


@pytest.mark.parametrize("command", commands())
def test_every_command_names_real_flags(command):
    """Catches a documented flag that was renamed."""
    script, *words = shlex.split(command)
    assert (ROOT / script).exists()
    if words and script in SCRIPTS and "--help" not in words:
        parse(config_of(script), words)


def test_links_lead_somewhere():
    """Catches a link to a file that moved, to a heading that was renamed, and a chapter that nobody
    finds."""
    for folder, text in ((ROOT, README), *((ROOT / "docs", text) for text in CHAPTERS.values())):
        assert [
            link
            for link in re.findall(r"\]\((?!http)([^)#]+)", text)
            if not (folder / link).exists()
        ] == []
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", README) if link not in anchors] == []
    assert [name for name in CHAPTERS if f"](docs/{name})" not in README] == []


def test_links_to_lines_show_that_line():
    """Catches a link into a file whose lines have moved: what it quotes must stand there, once as a
    definition or at all."""
    wrong = []
    for code, name, number in re.findall(r"\[`([^`\n]+)`\]\(([\w.]+)#L(\d+)\)", README):
        lines = (ROOT / name).read_text().splitlines()
        found = [
            i
            for i, line in enumerate(lines, 1)
            if re.search(re.escape(code) + (r"\b" if code[-1].isalnum() else ""), line)
        ]
        if int(number) not in found[:1]:
            wrong.append((code, name, int(number), found[:1]))
    assert wrong == [] and README.count("#L") > 40


def test_pictures_are_small_and_there():
    """Catches a picture that is linked and missing, lies about unused, or makes the repository
    heavy."""
    there = {
        path.name: path.stat().st_size
        for path in (ROOT / "docs").glob("*")
        if path.suffix in (".svg", ".png")
    }
    assert (
        set(re.findall(r"!\[[^\]]*\]\(docs/([^)]+)\)", README)) == set(there)
        and max(there.values()) < 200_000
    )


@pytest.mark.extra
def test_pictures_are_those_of_the_committed_results(tmp_path):
    """Catches a picture that no longer is what the script draws."""
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-extra.txt)")
    script(ROOT, "pictures.py", "--docs", str(tmp_path))
    for path in (ROOT / "docs").glob("*.svg"):
        assert (tmp_path / path.name).read_text() == path.read_text(), (
            f"python pictures.py would draw another docs/{path.name}"
        )


def test_mgrpo_lines_are_marked():
    """Catches README's grep showing nothing: what GRPO would not have is marked in the rollout, the
    loop and the advantages."""
    assert all((ROOT / name).read_text().count("MGRPO:") >= 2 for name in ("mgrpo.py", "train.py"))


def test_nothing_is_left_to_fill_in():
    """Catches a placeholder that was never replaced, in any tracked text."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split() or ["README.md"]
    marks = ("@" * 2, "TO" + "DO", "FIX" + "ME")
    texts = [
        (
            name,
            re.sub(
                r"^```diff$.*?^```$",
                "",
                (ROOT / name).read_text(errors="ignore"),
                flags=re.M | re.S,
            ),
        )
        for name in tracked
        if name.endswith((".py", ".md", ".txt")) and (ROOT / name).exists()
    ]
    assert [(name, mark) for name, text in texts for mark in marks if mark in text] == []
