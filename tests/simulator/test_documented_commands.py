"""Every `python -m simulator …` of the README and the docs: it runs, and what it plans fits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simulator.__main__ import application

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^ {4}python -m simulator ((?:.*\\\n)*.*)$", re.MULTILINE)
# A shape's search takes minutes with the shortlist that is documented.
FEWER = {"shape": ["--shortlist", "3"]}


def documented() -> dict[str, list[str]]:
    """The commands of each file, in order: a later one may read what an earlier one wrote."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {
        file.name: [match.replace("\\\n", " ") for match in COMMAND.findall(file.read_text())]
        for file in files
    }
    return {name: commands for name, commands in found.items() if commands}


def verdicts(answer: Any) -> Iterator[bool]:
    """Whatever is said about fitting, anywhere in an answer."""
    if isinstance(answer, dict):
        if isinstance(answer.get("fits"), bool):
            yield answer["fits"]
        if "fitting" in answer:
            yield answer["fitting"] > 0
        for value in answer.values():
            yield from verdicts(value)
    elif isinstance(answer, list):
        for value in answer:
            yield from verdicts(value)


def before(folder: Path) -> None:
    """What commands of other programs have written by then: a calibration, a model's import."""
    shutil.copy(ROOT / "configs" / "hardware" / "a100.yaml", folder / "here.yaml")
    (folder / "DIR").mkdir()
    model = "# @package _global_\ndefaults:\n  - override /model: qwen3_30b_a3b\n"
    (folder / "DIR" / "model.yaml").write_text(model + "model: {num_layers: 4}\n")


def test_there_are_some():
    assert {"README.md", "simulator.md"} <= set(documented())


@pytest.mark.end_to_end
@pytest.mark.parametrize("file", documented())
def test_commands_run_and_what_they_plan_fits(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before(tmp_path)
    for line in documented()[file]:
        assert "…" not in line, "a command that cannot be pasted"
        name, *arguments = shlex.split(line)
        command = [name, *arguments, *FEWER.get(name, []), "--json"]
        done = CliRunner().invoke(application([name]), command)
        assert done.exit_code == 0, (line, done.exception, done.output[-500:])
        if name in ("validate", "shape"):  # neither plans one layout
            continue
        said = list(verdicts(json.loads(done.stdout)))
        assert said, line
        assert all(said), line
