"""Bring models in and take them out: `python -m pangu.convert import|export PATH --out DIR`."""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pangu.checkpoint import WeightsError
from pangu.command_line import progress_bar, run

app = typer.Typer(
    add_completion=False, help=__doc__, no_args_is_help=True, rich_markup_mode="markdown"
)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Out = Annotated[Path, typer.Option("--out", help="a new folder")]
Check = Annotated[bool, typer.Option(help="compare the result's logits with transformers")]


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="a folder of safetensors, or a .gguf file")],
    out: Out,
    check: Check = True,
) -> None:
    """A Hugging Face model or a .gguf file becomes a folder that train, generate and the planner
    take: checkpoint.resume=DIR, checkpoint=DIR, experiment=DIR/model.yaml."""
    from pangu.weights.convert import import_model

    config = import_model(path, out, progress_bar)
    said = _compared(out, path, out, own_class=False) if check else ""
    print(
        f"{config.model.name} is in {out}; plan or train it with experiment={out}/model.yaml{said}"
    )


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="a run, a checkpoint, or what import wrote")],
    out: Out,
    dtype: Annotated[
        Dtype | None, typer.Option(help="of the weights; left out, as they are stored")
    ] = None,
    check: Check = True,
) -> None:
    """A model of ours becomes a Hugging Face one: safetensors, config.json, tokenizer."""
    import torch

    from pangu.weights.convert import export_model

    stored = getattr(torch, dtype.value) if dtype else None
    name = export_model(path, out, progress_bar, stored)
    said = _compared(path, out, out, own_class=True, dtype=stored) if check else ""
    print(f"{name} is in {out}{said}")


def _compared(ours: Path, theirs: Path, out: Path, **options: Any) -> str:
    """A line about both; `out`, one of them, is gone if they are not the same."""
    from pangu.logit_check import compared

    try:
        return "\n" + compared(ours, theirs, **options)
    except WeightsError:
        shutil.rmtree(out)
        raise


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    from configs.violation import ConfigError

    return run(app, arguments, ConfigError, WeightsError)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    sys.exit(main(sys.argv[1:]))
