"""docs/dependencies.md lists what is installed."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| \[?([\w.-]+)\]?\S* \| (\S+) \| (.+) \|$", re.MULTILINE)


def test_every_pinned_package_has_a_licence() -> None:
    """In its pinned version; setuptools is of Python's own environment."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    del pinned["setuptools"]
    rows = ROW.findall((ROOT / "docs/dependencies.md").read_text())
    listed = {name.lower().replace("_", "-"): version for name, version, _ in rows[1:]}
    assert {name: version.split("+")[0] for name, version in listed.items()} == pinned
    assert "UNKNOWN" not in {licence for *_, licence in rows}
