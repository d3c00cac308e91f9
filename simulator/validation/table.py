"""Reading a table of published measurements, with one sentence about whatever is wrong in it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

from configs.violation import ConfigError, Violation

PACKAGED = Path(__file__).parent / "measured.csv"

_SHAPE = "layers,hidden,ffn,heads,kv_heads,head_dim,vocab,seq,n_experts,topk,moe_ffn,shared_experts"
_LAYOUT = "device,n_devices,tp,pp,vpp,ep,etp,cp,dp,micro_batch,global_batch,recompute,precision"
_COLUMNS = f"id,source,model,{_SHAPE},dense_layers,mla,mlp,{_LAYOUT}"
_COLUMNS += ",measured_metric,value,notes,missing"
COLUMNS = _COLUMNS.split(",")
_TEXTS = (
    "id,source,model,head_dim,shared_experts,mla,mlp,device,recompute,precision,measured_metric"
)
_TEXTS += ",value,notes,missing"
COUNTS = [name for name in COLUMNS if name not in _TEXTS.split(",")]
CORE_VERSION = "core_version"  # a column that a table may have
MAY_BE_ZERO = ("n_experts", "dense_layers")


@dataclass(frozen=True)
class Row:
    """One line of a table: texts as they stand; `numbers` holds the counts that are given,
    `declared` what further columns named like configuration keys say of the engine."""

    cells: dict[str, str]
    numbers: dict[str, int]
    measured: float | None  # None where the value is no single number
    declared: dict[str, str] = field(default_factory=dict)
    core_version: str = ""  # of megatron-core, where a column of that name says so

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str, otherwise: int = 0) -> int:
        return self.numbers.get(column, otherwise)

    def mentions(self, *words: str) -> bool:
        """Whether the notes, recomputation or source contain one of `words`, in any case."""
        text = " ".join(self.cells[name] for name in ("notes", "recompute", "source")).lower()
        return any(word.lower() in text for word in words)


def read_table(path: Path = PACKAGED) -> list[Row]:
    """All rows of a table with the columns of the packaged one.

    Raises:
        ConfigError: the file cannot be read, lacks columns, or holds an impossible number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                reason = f"the table lacks the columns {', '.join(missing)}"
                raise ConfigError([Violation("--table", path, reason)])
            lines_read = [_stripped(line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([Violation("--table", path, f"cannot be read: {error}")]) from error
    if not lines_read:
        raise ConfigError([Violation("--table", path, "the table has no rows")])
    return [_row(path, line, values) for line, values in enumerate(lines_read, start=2)]


def _stripped(line: dict[str, str | None]) -> dict[str, str]:
    """The cells of the known columns and of those that a table may have beside them."""
    return {
        name: (text or "").strip()
        for name, text in line.items()
        if name in COLUMNS or (name and ("." in name or name == CORE_VERSION))
    }


def _row(path: Path, line: int, every: dict[str, str]) -> Row:
    cells = {name: every[name] for name in COLUMNS}
    declared = {name: text for name, text in every.items() if "." in name and text}
    numbers = {}
    for name in COUNTS:
        text = cells[name]
        if not text:
            continue
        value = _number(text)
        possible = value is not None and value == int(value) and value >= 0
        if value is None or not possible or (value == 0 and name not in MAY_BE_ZERO):
            reason = f"line {line}: {name} is '{text}', which is no positive whole number"
            raise ConfigError([Violation("--table", path, reason)])
        numbers[name] = int(value)
    measured = _number(cells["value"])
    if measured is None and (not cells["value"] or _is_nan(cells["value"])):
        text = cells["value"] or "empty"
        reason = f"line {line}: the measured value is {text}"
        raise ConfigError([Violation("--table", path, reason)])
    if measured is not None and measured <= 0:
        reason = f"line {line}: the measured value {cells['value']} is not positive"
        raise ConfigError([Violation("--table", path, reason)])
    return Row(cells, numbers, measured, declared, every.get(CORE_VERSION, ""))


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_nan(text: str) -> bool:
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False
