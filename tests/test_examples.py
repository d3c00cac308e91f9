"""The diffs of docs/architecture.md apply to a copy of the tree and do what they are shown for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"^--- (\S+)\n\+\+\+ b/(\S+)\n((?:[@ +-].*\n|\n)*?)(?=^--- |\Z)", re.MULTILINE)


def apply(diff: str, tree: Path) -> list[str]:
    """The files of a diff whose places are found by their lines alone, which must be there once."""
    changed = []
    for before, name, body in FILE.findall(diff):
        path = tree / name
        assert path.exists() == (before != "/dev/null"), name
        text = path.read_text() if path.exists() else ""
        for hunk in body.split("@@\n")[1:]:
            lines = hunk.splitlines()
            old, new = (
                "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", sign))
                for sign in "-+"
            )
            assert text.count(old) == 1 or not text, f"{name}:\n{old}"
            text = text.replace(old, new) if text else new
        path.write_text(text)
        changed.append(name)
    return changed


def test_what_is_shown_of_adding_parts_works(tmp_path: Path) -> None:
    for name in ("configs", "pangu", "simulator", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/architecture.md").read_text()
    shown = re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    changed = [apply(diff, tmp_path) for diff in shown]
    assert len(changed) == 5
    assert all(changed)
    paths = [tmp_path, ROOT / "tests", ROOT / "tests/moe"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests/examples_in_use.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
