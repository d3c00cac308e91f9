"""What command lines share: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import typer

from configs.violation import ConfigError, Violation

T = TypeVar("T")
GROUPS = ("speculative", "parallel", "launch")  # of keys that are written group.key
Ranges = dict[str, tuple[bool, str]]  # by field: whether it fits, and if not why


def option_keys(kind: type[Any]) -> dict[str, str]:
    """The key of each field of a dataclass of options: `speculative_tokens` is written
    `speculative.tokens`."""
    return {field.name: _key(field.name) for field in fields(kind)}


def _key(name: str) -> str:
    group, underscore, rest = name.partition("_")
    return f"{group}.{rest}" if underscore and group in GROUPS else name


def read_options(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[Violation]]:
    """Options of the form key=value, as a dataclass whose first field must be given; and what is
    wrong with them: unknown and malformed ones, which keep their defaults."""
    from pydantic import TypeAdapter, ValidationError

    keys = option_keys(kind)
    names = {key: name for name, key in keys.items()}
    needed = next(iter(keys))
    given, violations = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in names and equals:
            given[names[key]] = value
        else:
            reason = "unknown key" if equals else "is not of the form key=value"
            violations.append(Violation(key, value, reason, f"known: {', '.join(names)}"))
    if needed not in given:
        violations.append(Violation(needed, "", "is missing", f"{needed}=RUN_DIR"))
    options: dict[str, str] = {needed: ""} | given
    try:
        return TypeAdapter(kind).validate_python(options), violations
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0])
            violations.append(Violation(keys[name], item["input"], item["msg"].lower()))
            del options[name]
        return TypeAdapter(kind).validate_python(options), violations


def refuse(options: Any, violations: list[Violation], ranges: Ranges) -> None:
    """Raises:
    ConfigError: there are `violations`, or fields of `options` do not fit.
    """
    keys = option_keys(type(options))
    wrong = [
        Violation(keys[name], getattr(options, name), reason)
        for name, (fits, reason) in ranges.items()
        if not fits
    ]
    if violations or wrong:
        raise ConfigError([*violations, *wrong])


def speculation_ranges(speculative: str, tokens: int | str, draft: str, tree: bool) -> Ranges:
    """What generation and serving want of their `speculative…` options."""
    return {
        "speculative_tokens": (
            tokens == "auto" or 1 <= int(tokens) <= 64,
            "1 to 64 guesses make sense, or auto",
        ),
        "speculative_tree": (
            not (tree and speculative == "none"),
            "somebody has to make the guesses of a tree: speculative=ngram, draft or mtp",
        ),
        "draft": (
            (speculative == "draft") == bool(draft),
            "speculative=draft and draft=DIR belong together",
        ),
    }


def task_ranges(patterns: str, task: str, keep: float) -> Ranges:
    """What generation and serving want of the options that choose experts."""
    return {
        "keep": (0 < keep <= 1, "a part is more than 0 and at most 1"),
        "task": (bool(patterns) or task == "auto", "tasks are in patterns=DIR"),
    }


def sentence(error: Exception) -> str:
    """What a mistake says; of a file that this user may not use, which one and why."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def progress_bar(steps: Iterable) -> Iterable:
    """The same steps, with a bar on the terminal that is gone after the last."""
    from tqdm import tqdm

    return tqdm(steps, leave=False, file=sys.stderr)


def run(app: typer.Typer, arguments: list[str], *mistakes: type[Exception]) -> int:
    """The exit code of `app`: 0 done, 2 one of `mistakes`, a folder that this user may not
    use, or wrong words on the command line.

    Raises:
        SystemExit: a SIGTERM came; what was half written is gone then, as after Ctrl-C.
    """
    warnings.filterwarnings(
        "ignore", module="megatron|torch"
    )  # of what is not installed beside them
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return app(arguments, standalone_mode=False) or 0
    except mistakes as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
    except PermissionError as error:  # even of whether there is a file
        print(f"error: {sentence(error)}", file=sys.stderr)
    except typer.Exit as leave:
        return leave.exit_code
    except Exception as error:
        if not hasattr(error, "show"):  # click's own
            raise
        error.show()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 2
