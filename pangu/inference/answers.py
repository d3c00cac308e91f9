"""Prompts from a file, and answers to a file: a run that was stopped goes on behind the last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


class AnswersError(Exception):
    """A file that cannot be used; the message is a sentence."""


def read_prompts(path: Path) -> list[str]:
    """One a line; of a .jsonl file the `prompt` of every line.

    Raises:
        AnswersError: the file cannot be read, has none, or a line has no such text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnswersError(str(error)) from None
    if not lines:
        raise AnswersError("the file is empty")
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        prompt = _row(line).get("prompt")
        if not isinstance(prompt, str):
            raise AnswersError(f"line {number} is no JSON object with a text under 'prompt'")
        found.append(prompt)
    return found


def _row(line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def answer(prompt: str, text: str, finish: str) -> str:
    """The JSON line of one; `document` is the prompt and its answer, as a corpus wants them."""
    row = {"prompt": prompt, "text": text, "finish": finish, "document": prompt + text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def take_up(path: Path, prompts: Sequence[str]) -> tuple[TextIO, int]:
    """The file, opened behind its last whole line, and how many prompts it has answered.

    Raises:
        AnswersError: it cannot be written, or has answers to other prompts.
    """
    try:
        path.touch()
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").split("\n")[:-1]
        for number, line in enumerate(lines):
            if number >= len(prompts) or _row(line).get("prompt") != prompts[number]:
                raise AnswersError(f"line {number + 1} answers no such prompt: name another file")
        file = path.open("r+", encoding="utf-8", newline="\n")
        file.truncate(len(whole))
        file.seek(len(whole))
    except (OSError, UnicodeDecodeError) as error:
        raise AnswersError(f"cannot be used: {error}") from None
    return file, len(lines)
