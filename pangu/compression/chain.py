"""Steps one after the other, each judged: a file names them, each runs as a command of its own, and
one that is done is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from configs.violation import ConfigError, Violation
from pangu.processes import die_with_parent
from pangu.run_lock import hold

DONE, LOCK = "steps.json", ".chain.lock"
STEPS = ("prune-layers", "carve", "prune-experts", "quantize", "export")


@dataclass
class Chain:
    """`steps` are commands of pangu.compress, or `export`, each with its options; `text` and
    `tasks` judge the model before them and after each, on `tokens` tokens in windows of `window`,
    and `limit` questions of a task."""

    model: Path
    out: Path
    text: Path
    steps: Annotated[list[dict[str, dict[str, Any] | None]], Field(min_length=1)]
    tasks: list[Path] = field(default_factory=list)
    tokens: int = 2**31
    window: int = 1024
    limit: int = 2**31


@dataclass
class Row:
    """A finished step: its command, bytes of the weights, and how the model was judged."""

    words: list[str]
    bytes: int
    perplexity: float | None = None  # None: an exported model, which others run
    accuracies: dict[str, float] = field(default_factory=dict)


def read_chain(file: Path) -> Chain:
    """Raises:
    ConfigError: the file cannot be read, or is not as `Chain` has it.
    """
    try:
        chain = TypeAdapter(Chain).validate_python(yaml.safe_load(file.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([Violation("FILE", file, f"cannot be read: {error}")]) from None
    except ValidationError as error:
        wrong = [(".".join(map(str, e["loc"])) or "FILE", e) for e in error.errors()]
        raise ConfigError([Violation(k, e["input"], e["msg"].lower()) for k, e in wrong]) from None
    if any(len(step) != 1 for step in chain.steps):
        raise ConfigError([Violation("steps", file, "each is one command with its options")])
    if unknown := [name for step in chain.steps for name in step if name not in STEPS]:
        raise ConfigError([Violation("steps", unknown[0], f"is none of {', '.join(STEPS)}")])
    return chain


def run_chain(chain: Chain) -> str:
    """Do what is left to do; returns a table of all steps.

    Raises:
        ConfigError: a step failed, or was another one when `out` was begun, or somebody else is at
            it in `out`.
    """
    with hold(chain.out, LOCK, "out"):
        return _run_alone(chain)


def _run_alone(chain: Chain) -> str:
    begun = chain.out / DONE
    rows = _finished(begun)
    model = chain.model
    for number, (name, words) in enumerate(_commands(chain)):
        if number < len(rows) and rows[number].words != words:
            reason = f"step {number} was another one: {' '.join(rows[number].words)}"
            raise ConfigError([Violation("steps", name, reason, "a new `out`")])
        target = _folder(chain, number)
        if number >= len(rows):
            if number and not target.exists():  # it appears when it is whole
                _run([*words, str(target)])
            rows.append(_judged(chain, name, words, target))
            begun.with_suffix(".new").write_text(json.dumps([asdict(row) for row in rows]))
            begun.with_suffix(".new").rename(begun)
        model = target
    return table([name for name, _ in _commands(chain)], rows, model)


def _finished(begun: Path) -> list[Row]:
    if not begun.is_file():
        return []
    try:
        return [Row(**row) for row in json.loads(begun.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        reason = f"holds no finished steps: {error}"
        raise ConfigError([Violation("out", begun, reason, "a new `out`")]) from None


def _commands(chain: Chain) -> list[tuple[str, list[str]]]:
    """Name and words of the model as it is and of every step, without the output folder."""
    found: list[tuple[str, list[str]]] = [("as it was", [str(chain.model)])]
    for number, step in enumerate(chain.steps):
        ((name, options),) = step.items()
        tool = "pangu.convert" if name == "export" else "pangu.compress"
        words = [tool, name, str(_folder(chain, number))]
        for key, value in (options or {}).items():
            flag = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                words += [flag] * value
                continue
            for one in value if isinstance(value, list) else [value]:  # several tasks
                words += [flag, str(one)]
        found.append((name, [*words, "--out"]))
    return found


def _folder(chain: Chain, number: int) -> Path:
    """What the step of that number, from 1, leaves; 0 is the model as it was."""
    if number == 0:
        return chain.model
    return chain.out / f"{number}-{next(iter(chain.steps[number - 1]))}"


def _run(words: list[str]) -> str:
    command = [sys.executable, "-m", *words]
    # Killed with this process: a step that goes on would write beside the one that begins it again.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()  # it removes what it has half written
            raise
    if process.returncode:
        raise ConfigError([Violation("steps", " ".join(words), f"exit code {process.returncode}")])
    return output


def _judged(chain: Chain, name: str, words: list[str], folder: Path) -> Row:
    from pangu.weights.quantized_file import weight_bytes

    if name == "export":
        files = folder.glob("*.safetensors")
        return Row(words, sum(file.stat().st_size for file in files))
    options = ["--text", chain.text, "--tokens", chain.tokens, "--window", chain.window]
    options += [word for task in chain.tasks for word in ("--task", task)]
    options += ["--limit", chain.limit, "--json"]
    found = json.loads(_run(["pangu.evaluate", str(folder), *map(str, options)]))
    accuracies = {task: value["accuracy"] for task, value in found.get("tasks", {}).items()}
    return Row(words, weight_bytes(folder), found["perplexity"], accuracies)


def table(names: list[str], rows: list[Row], last: Path) -> str:
    """A line for each step."""
    tasks = list(rows[0].accuracies)
    lines = [f"{'':16}{'MB':>10}{'perplexity':>12}" + "".join(f"  {task}" for task in tasks)]
    for name, row in zip(names, rows, strict=True):
        judged = "" if row.perplexity is None else f"{row.perplexity:12.3f}"
        correct = "".join(f"{row.accuracies[t]:{len(t) + 2}.1%}" for t in row.accuracies)
        lines.append(f"{name:16}{row.bytes / 1e6:10,.1f}{judged}{correct}")
    return "\n".join([*lines, f"(the last one is {last})"])
