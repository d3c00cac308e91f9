"""How well a model predicts text: `python -m pangu.evaluate MODEL --text FILE`.

MODEL is a run folder, one of its checkpoints, or a folder that `pangu.convert import` wrote.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pangu.command_line import run

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a run folder, a checkpoint or an imported model")],
    text: Annotated[Path, typer.Option("--text", help="a UTF-8 text file")],
    tokens: Annotated[int, typer.Option(min=2, help="at most so many tokens of it")] = 2**31,
    window: Annotated[int, typer.Option(min=2, help="tokens that see each other")] = 1024,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda or npu")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="numbers alone")] = False,
) -> None:
    """Perplexity and bits per byte of a text, with their standard error from window to window."""
    report = text_report(model, text, tokens, window, backend)
    if as_json:
        print(json.dumps(report))
        return
    low, high = report["perplexity_interval"]
    print(f"{report['tokens']:,} tokens of {text}, windows of {window}")
    print(f"perplexity     {report['perplexity']:.3f}  ({low:.3f} to {high:.3f}, one sigma)")
    print(f"bits per byte  {report['bits_per_byte']:.4f}")


def text_report(folder: Path, text: Path, tokens: int, window: int, backend: str) -> dict[str, Any]:
    """Perplexity, bits per byte and tokens of a text.

    Raises:
        ConfigError: the model or the text cannot be used.
    """
    from configs.violation import ConfigError, Violation

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Violation("--text", text, f"cannot be read: {error}")]) from None
    from pangu.trained_model import loaded

    with loaded(folder, backend) as (model, tokenizer, config):
        longest = config.model.max_position_embeddings
        if window > longest:
            reason = f"the model was made for {longest} positions"
            raise ConfigError([Violation("--window", window, reason, f"at most {longest}")])
        ids = tokenizer.encode(content)[:tokens]
        if len(ids) < 2:
            raise ConfigError([Violation("--text", text, "has not even two tokens")])
        from pangu.inference.likelihood import text_likelihood, windows

        found = text_likelihood(model, ids, window, _bar)
        size = sum(len(tokenizer.decode(list(part)[1:]).encode()) for part in windows(ids, window))
    mean = found.nats / found.tokens
    spread = found.standard_error
    interval = [math.exp(mean - spread), math.exp(mean + spread)]
    return {
        "perplexity": found.perplexity,
        "perplexity_interval": interval,
        "bits_per_byte": found.nats / math.log(2) / size,
        "tokens": found.tokens,
        "windows": found.windows,
        "nats_per_token": mean,
        "standard_error": spread,
    }


def _bar(windows: Iterable) -> Iterable:
    from tqdm import tqdm

    return tqdm(windows, unit="window", leave=False, file=sys.stderr)


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    from configs.violation import ConfigError

    return run(app, arguments, ConfigError)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    sys.exit(main(sys.argv[1:]))
