"""README.zh-CN.md in step with README.md: what is not prose is the same, in the same order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
LINK = re.compile(r"\]\(([^)]+)\)")
FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def blocks(text: str) -> list[str]:
    """Commands, which are indented, and what they print, in fences."""
    return re.findall(r"^```\n.*?^```$|(?:^ {4}[^\n]*\n)+", text, re.MULTILINE | re.DOTALL)


def outline(text: str) -> list[str]:
    """The level of every heading, and the width of every row of a table."""
    prose = re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = [f"heading {len(found)}" for found in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    rows = [f"row {line.count('|')}" for line in prose.splitlines() if line.startswith("|")]
    return headings + rows


def test_commands_and_what_they_print_are_the_same():
    found = blocks(OURS.read_text())
    assert len(found) > 8
    assert blocks(CHINESE.read_text()) == found


def test_headings_and_tables_correspond():
    assert outline(CHINESE.read_text()) == outline(OURS.read_text())


def test_links_lead_to_the_same_places():
    """But for those from one README to the other."""
    ours, theirs = (
        sorted(set(LINK.findall(path.read_text())) - {OURS.name, CHINESE.name})
        for path in (OURS, CHINESE)
    )
    assert theirs == ours
    assert all((ROOT / link).exists() for link in theirs if "://" not in link)


def test_measured_figures_are_the_same():
    """A row's figures, whatever the words around them; counts of tokens are told in 万 there."""
    rows = [
        [sorted(FIGURE.findall(line)) for line in path.read_text().splitlines() if "|" in line[:1]]
        for path in (OURS, CHINESE)
    ]
    spoken = {"3.7": "370"}
    for ours, theirs in zip(*rows, strict=True):
        assert sorted(spoken.get(figure, figure) for figure in ours) == theirs
