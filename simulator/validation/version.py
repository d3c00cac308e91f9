"""Which version of its engine a row was measured with, and what follows from it."""

from __future__ import annotations

import re

from simulator.validation.table import Row

# Tables that began after March 2025.
SINCE_CORE_0_12 = ("Megatron-Bridge", "ModelZoo", "MoE Models with Megatron Core")


def counts_half_the_square(row: Row) -> bool:
    """Whether model FLOPs count the causal half of attention's square.

    PaLM's formula counts all of it, and so did Megatron until core 0.12, which counts half for
    every kind of attention; of latent attention it has always counted half.
    """
    return is_recent(row)


def attends_with_flash_2(row: Row) -> bool:
    """Whether attention ran at FlashAttention 2's rates: engines before core 0.12, and PyTorch's
    own attention, as torchtitan has it."""
    return not is_recent(row)


def is_recent(row: Row) -> bool:
    """Whether a row is of megatron-core 0.12 (March 2025) or later.

    The version is a column of the table, stands in the notes, or follows from the source: an
    engine's release of a year and month, or a table that only newer versions were measured for.
    """
    stated = row.core_version or _first(r"(?:core|mcore|megatron-lm) v?(\d+\.\d+)", row["notes"])
    if stated:
        return _version(stated) >= (0, 12)
    release = _first(r"NeMo (\d\d\.\d\d)", row["notes"] + row["source"])
    if release:
        return _version(release) >= (25, 4)
    return any(name in row["source"] for name in SINCE_CORE_0_12)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.IGNORECASE)
    return found.group(1) if found else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
