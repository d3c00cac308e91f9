"""`python -m pangu.data.prepare INPUT… --output DIR`: text to a Megatron indexed corpus."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pangu.data import DataError

if TYPE_CHECKING:
    from pangu.data.corpus import CorpusInfo

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Folders of text, .jsonl(.gz) or .parquet files, or single files."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, SentencePiece .model, .tiktoken file, or another corpus' folder."
        ),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(help="Train a byte-level BPE of this vocabulary on the training part."),
    ] = None,
    eod: Annotated[
        str | None, typer.Option(help="Token that ends a document, if the tokenizer does not say.")
    ] = None,
    column: Annotated[str, typer.Option(help="JSON key or Parquet column of the text.")] = "text",
    pattern: Annotated[str, typer.Option(help="Which files of a folder, e.g. '*.py'.")] = "*",
    held_out: Annotated[
        float, typer.Option(help="Fraction of documents held out for validation, chosen by hash.")
    ] = 0.01,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Keep one of documents with the same text.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Tokenise text into DIR/train.bin|.idx and DIR/validation.bin|.idx.

    Train on it with data=indexed 'data.blend={DIR: 1.0}'; several folders are blended by weight.
    """
    begun = time.monotonic()
    try:
        _check(tokenizer, train_tokenizer, held_out, eod, workers)
        # The engine announces which optional packages it does without; none is needed here.
        warnings.filterwarnings("ignore", module="megatron|torch")
        from pangu.data.corpus import Preparation, prepare

        info = prepare(
            Preparation(
                inputs,
                output,
                tokenizer,
                train_tokenizer,
                eod,
                column,
                pattern,
                held_out,
                deduplicate,
                workers,
            )
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    _report(info, output, held_out, time.monotonic() - begun)


def _check(
    tokenizer: Path | None,
    train_tokenizer: int | None,
    held_out: float,
    eod: str | None,
    workers: int,
) -> None:
    """Raise a DataError for options that contradict each other or make no sense."""
    if (tokenizer is None) == (train_tokenizer is None):
        raise DataError("give either --tokenizer or --train-tokenizer")
    if not 0 <= held_out < 1:
        raise DataError(f"--held-out {held_out} is not a fraction from 0 up to 1")
    if eod == "":
        raise DataError("--eod is empty: give the name of a token")
    if workers < 1:
        raise DataError(f"--workers {workers} is not a number of processes")


def _report(info: CorpusInfo, output: Path, held_out: float, seconds: float) -> None:
    """Say what was written, at which rate, and what was left out."""
    for part, documents in info.documents.items():
        if documents:
            print(
                f"{output / part}: {documents:,} documents, {info.tokens[part]:,} tokens, "
                f"{info.text_bytes[part] / info.tokens[part]:.2f} bytes per token"
            )
    megabytes, tokens = sum(info.text_bytes.values()) / 1e6, sum(info.tokens.values())
    print(
        f"in {seconds:,.0f} s: {megabytes / seconds:,.2f} MB and {tokens / seconds:,.0f} tokens/s"
    )
    if info.duplicates:
        print(f"left out as duplicates: {info.duplicates:,}")
    for reason, some in info.left_out.items():
        more = ", …" if some.files > len(some.first) else ""
        print(f"left out as {reason}: {some.files:,} ({', '.join(some.first)}{more})")
    if held_out and not info.documents["validation"]:
        print(
            f"none of {info.documents['train']:,} documents fell into the {held_out:.2g} that is "
            "held out: without a validation part, train with train.validate_every=0, or prepare "
            "with a larger --held-out",
            file=sys.stderr,
        )


if __name__ == "__main__":
    app()
