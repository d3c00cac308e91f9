"""Bring models in and take them out: `python -m pangu.convert import|export PATH --out DIR`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pangu.command_line import progress_bar, run

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Out = Annotated[Path, typer.Option("--out", help="a new folder")]


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="a folder of safetensors, or a .gguf file")],
    out: Out,
) -> None:
    """A Hugging Face model or a .gguf file becomes a folder that train, generate and the planner
    take: checkpoint.resume=DIR, checkpoint=DIR, experiment=DIR/model.yaml."""
    from pangu.weights.convert import import_model

    config = import_model(path, out, progress_bar)
    print(f"{config.model.name} is in {out}; plan or train it with experiment={out}/model.yaml")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="a run, a checkpoint, or what import wrote")],
    out: Out,
    dtype: Annotated[
        Dtype | None, typer.Option(help="of the weights; left out, as they are stored")
    ] = None,
) -> None:
    """A model of ours becomes a Hugging Face one: safetensors, config.json, tokenizer."""
    import torch

    from pangu.weights.convert import export_model

    kind = export_model(path, out, progress_bar, getattr(torch, dtype.value) if dtype else None)
    print(f"{kind.name} is in {out}")


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    from pangu.checkpoint import WeightsError

    return run(app, arguments, WeightsError)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
