"""Every command of the documentation is run by `python -m tests.drills.documented`, or has a reason
there; those that take a second are run here."""

import re
from pathlib import Path

import pytest
from drills.documented import CANNOT, MEANT, SHORTER, reason, run, shortened, texts
from test_documented import documented

LINES = [line for _, line in documented()]
# What the drill makes for a reader, or a command has made before.
NAMES = {"PATH", "MODEL", "MOE", "DIR", "FILE", "RUN_DIR", "PATTERNS"}
CHEAP = re.compile(
    r"pangu\.(doctor(?!.*(plan\.yaml|280t))|data\.(prepare(?!.*--pattern)|inspect))|--help"
)


def test_no_rule_is_left_over() -> None:
    rules = [*CANNOT, *SHORTER, *(part for part, *_ in MEANT)]
    assert [rule for rule in rules if not any(re.search(rule, line) for line in LINES)] == []


def test_what_is_run_has_no_words_for_the_reader_left() -> None:
    runs = [line for line in LINES if not reason(line)]
    assert len(runs) > 60
    for line in runs:
        words = shortened(line)
        capitals = re.findall(r"(?<![\w\'-])[A-Z][A-Z_]+(?![\w:])", " ".join(words))
        assert set(capitals) <= NAMES, line
        assert not any(re.search(r"^…|=…$", word) for word in words), line


@pytest.mark.end_to_end
def test_cheap_ones(tmp_path: Path) -> None:
    texts(tmp_path)
    chosen = [
        (page, line) for page, line in documented() if CHEAP.search(line) and not reason(line)
    ]
    assert len(chosen) > 5
    for page, line in chosen:
        done = run(page, line, tmp_path)
        assert done.code == 0, f"{line}\n{done.said[-2000:]}"
