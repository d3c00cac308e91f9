"""Every command of the documentation is one that its program takes: options, keys and values by the
program's own reading, folders of the repository by looking. What they do, others test."""

import itertools
import re
import shlex
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from test_translations import TWINS, lines

from configs.check import examine
from pangu import generate, serve
from pangu.calibrate import calibrate
from pangu.sweep import plan

ROOT = Path(__file__).parents[1]
PAGES = [*TWINS, "CONTRIBUTING.md", "docs/architecture.md"]
PROGRAMS = ("python", "torchrun", "make", "docker", "pip", "kubectl", "sbatch")
INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")
MODEL = "# @package _global_\ndefaults:\n  - override /model: qwen2_0_5b\n"


def documented() -> list[tuple[str, str]]:
    """Page and command, each once; of lines that stand apart, and in the midst of prose."""
    found: dict[str, str] = {}
    for page in PAGES:
        kinds = list(lines(page))
        block = "\n".join(line.strip() for kind, line in kinds if kind == "block")
        apart = [line.removeprefix(".venv/bin/") for line in block.replace("\\\n", " ").split("\n")]
        prose = "\n".join(line for kind, line in kinds if kind != "block")
        inline = [each.replace("\n", " ") for each in INLINE.findall(prose)]
        for line in (*apart, *inline):
            if line.startswith(PROGRAMS) and " " in line and "debootstrap" not in line:
                found.setdefault(" ".join(line.split()), page)
    return [(page, line) for line, page in found.items()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what stands for the user's files is."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/model", "runs/heads", "DIR", "CARVED"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.yaml").write_text(MODEL)
    (tmp_path / "plan.yaml").write_text("# @package _global_\nseed: 1\n")


def takes(words: list[str]) -> None:
    """Raises where a command is none. `…` in a word is what the reader puts there."""
    program, *rest = [word for word in words if "…" not in word]
    if program == "torchrun":  # its own words are left to it
        takes(["python", *rest[rest.index("-m") :]] if "-m" in rest else ["python", "-m"])
    elif program == "docker":
        container(rest)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(rest))).split(",")
        assert set(named) <= {"", *project["optional-dependencies"]}
    elif program in ("kubectl", "sbatch"):
        (file,) = (word for word in rest if word.startswith("launch/"))
        assert (ROOT / file).exists()
    elif rest[0] != "-m":
        assert (ROOT / rest[0]).exists()
    elif len(rest) > 1:  # else the module's name is left to the reader
        module(rest[1], rest[2:])


def container(words: list[str]) -> None:
    """`docker`'s own words are left to `docker`."""
    for flag, file in itertools.pairwise(words):
        assert flag != "-f" or (ROOT / file).exists()
    images = [at for at, word in enumerate(words) if word.startswith("pangu:")]
    if words[0] == "run" and images and words[images[0] + 1 :]:
        command, *rest = words[images[0] + 1 :]
        script = (ROOT / "docker/entrypoint.sh").read_text()
        ours = command in re.search(r"^(train .*)\)$", script, re.MULTILINE)[1].split(" | ")
        if command != "simulate":
            takes(["python", "-m", f"pangu.{command}", *rest] if ours else [command, *rest])


def module(name: str, words: list[str]) -> None:
    assert find_spec(name), name
    if "--" in words:  # tests.cluster: a command on nodes
        after = words[words.index("--") + 1 :]
        return takes(after) if after != ["COMMAND"] else None
    if name in ("pangu.train", "pangu.doctor"):
        wanted = [word for word in words if word not in ("-m", "--device-check")]
        if "-m" in words:
            assert len(plan(wanted)) > 1
        else:
            assert examine(wanted)[1] == []
    elif name in ("pangu.generate", "pangu.serve"):
        (generate if name == "pangu.generate" else serve).parse(words)
    elif name.startswith("pangu."):
        app = typer.Typer()
        app.command()(calibrate)
        where = f"{name}.__main__" if name == "pangu.report" else name
        own = app if name == "pangu.calibrate" else import_module(where).app
        command = typer.main.get_command(own)
        while hasattr(command, "commands") and words and words[0] != "METHOD":
            command, words = command.commands[words[0]], words[1:]
        if words and words[0] not in ("METHOD", "--help"):
            command.make_context(name, list(words))


def test_there_are_some_and_what_is_none_is_refused() -> None:
    assert len(documented()) > 90
    for none in (
        "python -m pangu.train moe.topk=8",
        "python -m pangu.serve checkpoint=a prot=1",
        "python -m pangu.evaluate a --txt b",
        "python -m tests.drills.nothing at all",
        "docker run pangu:cpu generate prompts=FILE top_z=1",
        "make nothing",
    ):
        with pytest.raises((Exception, SystemExit)):
            takes(shlex.split(none))


@pytest.mark.usefixtures("folder")
def test_every_command_is_one() -> None:
    wrong = []
    for page, line in documented():
        if line.startswith("python -m simulator"):  # run in test_documented_commands
            continue
        try:
            takes(shlex.split(line, comments=True))
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: {line}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
