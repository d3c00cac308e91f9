"""The Chinese pages keep step with the English: all but the words is the same, in its order."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# For those who work on the project, or written by a command.
ENGLISH_ALONE = {"architecture", "dependencies", "lab-notes", "reference"}
ENGLISH_ALONE |= {"simulator-accuracy", "simulator-peers"}
PAGES = sorted({page.stem for page in (ROOT / "docs").glob("*.md")} - ENGLISH_ALONE)
TWINS = {"README.md": "README.zh-CN.md"}
TWINS |= {f"docs/{name}.md": f"docs/zh-CN/{name}.md" for name in PAGES}
LINK = re.compile(r"\]\(([^)]+)\)")
CODE = re.compile(r"`[^`]+`")
FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
twins = pytest.mark.parametrize(("ours", "chinese"), TWINS.items(), ids=TWINS)


def lines(page: str) -> Iterator[tuple[str, str]]:
    """Each line and what it is: block (a command, its answer), heading, row, prose or empty."""
    fenced, before = False, "empty"
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        indented = line.startswith("    ") and before != "prose"  # behind prose, a list goes on
        if line.startswith("```"):
            fenced, kind = not fenced, "block"
        elif fenced or indented:
            kind = "block"
        elif re.match("#+ ", line):
            kind = "heading"
        else:
            kind = "row" if line.startswith("|") else "prose" if line else "empty"
        yield kind, line
        before = kind


def figures(text: str) -> list[str]:
    """And what is written as code, in any order, which languages do not share. 万 is ten thousand:
    370 万 is 3.7 M."""
    text = re.sub(r"(\d+) 万", lambda found: f"{int(found[1]) / 100:g}", text)
    code = [" ".join(span.split()) for span in CODE.findall(text)]
    return sorted(FIGURE.findall(CODE.sub("", text)) + code)


@twins
def test_commands_and_what_they_print_are_the_same(ours, chinese):
    found, there = (
        [line for kind, line in lines(page) if kind == "block"] for page in (ours, chinese)
    )
    assert there == found


def test_there_are_some():
    assert len(PAGES) > 10
    assert sum(kind == "block" for kind, _ in lines("README.md")) > 40


def outline(page: str) -> list[tuple[str, str | int, list[str]]]:
    """The level of every heading, the width of every row of a table, and their figures."""
    return [
        (kind, line.split()[0] if kind == "heading" else line.count("|"), figures(line))
        for kind, line in lines(page)
        if kind in ("heading", "row")
    ]


@twins
def test_headings_and_tables_correspond(ours, chinese):
    assert outline(chinese) == outline(ours)


def sections(page: str) -> list[list[str]]:
    """What the prose under each heading has."""
    found = [""]
    for kind, line in lines(page):
        if kind == "heading":
            found.append("")
        elif kind == "prose":
            found[-1] += LINK.sub("]", line) + "\n"
    return [figures(text) for text in found]


@twins
def test_prose_has_the_same_figures_and_code(ours, chinese):
    assert sections(chinese) == sections(ours)


def links(page: str) -> list[str]:
    """Where they lead, a translated page being the page; but for those between the READMEs."""
    back = {there: here for here, there in TWINS.items()}
    found = []
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        target = link if "://" in link else os.path.normpath(Path(page).parent / link)
        assert "://" in target or (ROOT / target).exists(), (page, link)
        twin = target in TWINS and target != "README.md"
        assert page in TWINS or not twin, f"{page}: {link} is there in Chinese"
        found.append(back.get(target, target))
    return sorted(set(found) - {"README.md"})


@twins
def test_links_lead_to_the_same_places(ours, chinese):
    assert links(chinese) == links(ours)


def test_the_site_leads_to_every_page_in_both_languages():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    entries = [page for entry in site["nav"] for page in entry.values()]
    (chinese,) = [entry for entry in entries if isinstance(entry, list)]
    ours = [page for page in entries if f"docs/{page}" in TWINS]
    assert sorted(ours) == sorted(f"{name}.md" for name in PAGES)
    assert [page for entry in chinese for page in entry.values()] == [
        f"zh-CN/{page}" for page in ours
    ]
