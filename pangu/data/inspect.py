"""`python -m pangu.data.inspect PREFIX…`: what a corpus holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pangu.data import DataError
from pangu.data.index_file import IndexedFiles, read_structure
from pangu.data.tokenizer import Tokenizer, load_tokenizer

WIDTH = 72
_SHADES = " ▁▂▃▄▅▆▇█"
# Tokens that are counted; of more, as many are taken evenly.
COUNTED = 1 << 28
_BLOCK = 1 << 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    corpora: Annotated[
        list[str], typer.Argument(help="Corpus folders, or PREFIX of PREFIX.bin and PREFIX.idx.")
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="What wrote them, if it is not beside them.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents to show, drawn at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Show documents, their lengths, how often tokens occur, and some of the text."""
    try:
        for prefix in (part for corpus in corpora for part in _parts(corpus)):
            print("\n".join(describe(prefix, tokenizer, samples, seed)))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _parts(corpus: str) -> list[str]:
    if not Path(corpus).is_dir():
        return [corpus]
    found = sorted(str(path.with_suffix("")) for path in Path(corpus).glob("*.idx"))
    if not found:
        raise DataError(f"{corpus} holds no .idx file")
    return found


def describe(prefix: str, tokenizer: Path | None, samples: int, seed: int) -> list[str]:
    """Lines about `prefix.bin` and `prefix.idx`.

    Raises:
        DataError: when they are damaged, or were not written with the tokenizer.
    """
    files = read_structure(prefix)
    lengths = document_lengths(files)
    lines = [f"{prefix}: {len(lengths):,} documents, {files.tokens:,} tokens ({files.token_type})"]
    if not files.tokens:
        return lines
    writer = load_tokenizer(tokenizer or Path(prefix).parent) if samples or tokenizer else None
    tokens = np.memmap(f"{prefix}.bin", files.token_type, "r")
    counts = count(tokens, prefix, writer.vocab_size if writer else 0)
    lines += [*_lengths(lengths), *_frequencies(counts, files.tokens, writer)]
    if writer:
        ends = np.cumsum(lengths)
        draw = np.random.default_rng(seed)
        chosen = draw.choice(len(lengths), min(samples, len(lengths)), replace=False)
        for number in sorted(chosen.tolist()):
            ids = tokens[ends[number] - lengths[number] : ends[number]][: 4 * WIDTH].tolist()
            text = " ".join(writer.decode(ids).split())
            more = "…" if len(text) > WIDTH or lengths[number] > 4 * WIDTH else ""
            lines.append(
                f"  document {number:,} ({lengths[number]:,} tokens): {text[:WIDTH]}{more}"
            )
    return lines


def document_lengths(files: IndexedFiles) -> np.ndarray:
    """Tokens of each document, `[documents]` int64."""
    ends = np.concatenate(([0], np.cumsum(files.lengths, dtype=np.int64)))
    return np.diff(ends[files.documents])


def count(tokens: np.ndarray, prefix: str, vocab_size: int) -> np.ndarray:
    """Occurrences of each token, `[vocab_size or more]` int64, in up to `COUNTED` of `tokens`.

    Raises:
        DataError: for a token that is negative, or not below a `vocab_size` that is not 0.
    """
    blocks = -(-len(tokens) // _BLOCK)
    chosen = np.unique(np.linspace(0, blocks - 1, min(blocks, COUNTED // _BLOCK)).astype(int))
    total = np.zeros(vocab_size, np.int64)
    for block in chosen:
        some = tokens[block * _BLOCK : (block + 1) * _BLOCK]
        smallest, largest = int(some.min()), int(some.max())
        if smallest < 0 or (vocab_size and largest >= vocab_size) or largest >= 1 << 27:
            wrong = smallest if smallest < 0 else largest
            known = f", and its tokenizer has {vocab_size:,}" if vocab_size else ""
            raise DataError(f"{prefix}.bin holds token {wrong}{known}: it is damaged")
        here = np.bincount(some, minlength=len(total))
        here[: len(total)] += total
        total = here
    return total


def _lengths(lengths: np.ndarray) -> list[str]:
    at = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    words = ("shortest", "10 %", "median", "90 %", "longest")
    parts = ", ".join(f"{word} {value:,}" for word, value in zip(words, at, strict=True))
    powers = np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1)
    rows = [
        f"  {1 << power:>12,}+ {number:>12,} {'█' * max(1, round(40 * number / powers.max()))}"
        for power, number in enumerate(powers.tolist())
        if number
    ]
    return [f"  tokens per document: {parts}, mean {lengths.mean():,.1f}", *rows]


def _frequencies(counts: np.ndarray, tokens: int, writer: Tokenizer | None) -> list[str]:
    seen, total = int(np.count_nonzero(counts)), int(counts.sum())
    taken = "" if total == tokens else f", in {total:,} tokens taken evenly"
    lines = [
        f"  ids in use: {seen:,} of {len(counts):,}{taken}",
        f"  frequency by id, logarithmic, {-(-len(counts) // WIDTH):,} ids a column:",
        f"  {heat_line(counts)}",
    ]
    top = np.argsort(-counts, kind="stable")[:8]
    named = [
        f"{writer.decode([int(token)])!r} {counts[token] / total:.1%}"
        if writer
        else f"{token} {counts[token] / total:.1%}"
        for token in top
        if counts[token]
    ]
    return [*lines, f"  most frequent: {', '.join(named)}"]


def heat_line(counts: np.ndarray) -> str:
    """`counts` `[ids]` in at most `WIDTH` columns: blank where none of a column's ids occurs, and
    then from the lowest to the highest block by the logarithm of their occurrences."""
    width = -(-len(counts) // WIDTH)
    padded = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
    scale = np.log2(np.maximum(padded, 1)) / max(1.0, np.log2(padded.max()))
    steps = 1 + np.round(scale * (len(_SHADES) - 2)).astype(int)
    return "".join(_SHADES[step] if some else " " for step, some in zip(steps, padded, strict=True))


if __name__ == "__main__":
    app()
