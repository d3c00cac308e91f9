"""Make a model smaller: `python -m pangu.compress METHOD MODEL … --out DIR`.

MODEL is a run folder, one of its checkpoints, or a folder that `pangu.convert import` wrote. DIR is
taken wherever a model is named.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pangu.command_line import progress_bar, run

app = typer.Typer(
    add_completion=False, help=__doc__, no_args_is_help=True, rich_markup_mode="markdown"
)


class Patch(StrEnum):
    NONE = "none"
    DIAGONAL = "diagonal"
    HADAMARD = "hadamard"


class Method(StrEnum):
    RTN = "rtn"
    AWQ = "awq"
    GPTQ = "gptq"
    SMOOTHQUANT = "smoothquant"
    FLATQUANT = "flatquant"


class Keys(StrEnum):
    TOKEN = "token"
    CHANNEL = "channel"


class Score(StrEnum):
    PEU = "peu"
    TCESS = "tcess"
    FREQUENCY = "frequency"
    RANDOM = "random"


Model = Annotated[Path, typer.Argument(help="a run folder, a checkpoint or an imported model")]
Out = Annotated[Path, typer.Option("--out", help="a new folder")]
Calibration = Annotated[Path, typer.Option("--calibration", help="a UTF-8 text file")]
Tokens = Annotated[int, typer.Option(min=2, help="at most so many tokens of calibration text")]
Window = Annotated[int, typer.Option(min=2, help="tokens that see each other")]
Text = Annotated[
    Path | None, typer.Option("--text", help="judged by before and after; else by calibration text")
]
Backend = Annotated[str, typer.Option(help="auto, cpu, cuda or npu")]


@app.callback()
def methods() -> None:
    """Make a model smaller, and say what it costs."""


@app.command("prune-layers")
def prune_layers(
    model: Model,
    layers: Annotated[int, typer.Option(min=0, help="how many layers to leave out")],
    calibration: Calibration,
    out: Out,
    patch: Annotated[Patch, typer.Option(help="what leads over the gap")] = Patch.HADAMARD,
    start: Annotated[
        int | None, typer.Option(min=0, help="first layer to leave out; else the best is found")
    ] = None,
    tokens: Tokens = 128 * 2048,
    window: Window = 2048,
    text: Text = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="the patch learns what the whole model predicts")
    ] = False,
    distill_tokens: Annotated[
        int, typer.Option(min=2, help="at most so many tokens of calibration text to learn from")
    ] = 5000 * 2048,
    top: Annotated[
        int, typer.Option(min=2, help="largest logits of a position that are kept, on the disk")
    ] = 100,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="of the patch, AdamW")] = 1e-4,
    backend: Backend = "auto",
) -> None:
    """LinearPatch: leave out the layers that change the residual stream least.

    Of all windows of so many layers the one goes whose input and output are most alike (cosine
    over channels, mean over calibration tokens). The layer behind it takes the input of the window
    through a matrix P: its channels scaled to the size they had there (diagonal), or its
    coordinates in a Hadamard basis (hadamard), where outliers are spread over all of them. With
    --distill P alone then learns from the whole model's largest logits.
    """
    from pangu.compression import layers as pruning
    from pangu.compression.texts import Texts

    texts = Texts(calibration, tokens, window, text)
    choice = pruning.Choice(layers, patch.value, start)
    taught = pruning.Distillation(distill_tokens, top, learning_rate) if distill else None
    table = pruning.prune(model, out, choice, texts, taught, backend=backend, progress=progress_bar)
    _say(table, out)


@app.command()
def quantize(
    model: Model,
    scheme: Annotated[
        str, typer.Option(help="W4A16, W8A8, W8A8KV8, W16A16KV4, …; W4A16_ASYM has zero points")
    ],
    calibration: Annotated[
        Path, typer.Option("--calibration", help="a UTF-8 text file; self: what the model writes")
    ],
    out: Out,
    method: Annotated[Method, typer.Option(help="how weights are rounded")] = Method.RTN,
    group_size: Annotated[int, typer.Option(min=8, help="columns of a row with one scale")] = 128,
    keys: Annotated[
        Keys, typer.Option(help="with KV8, KV4, …: after rotation by token, or before by channel")
    ] = Keys.TOKEN,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="spread outliers over all channels before (QuaRot)")
    ] = False,
    epochs: Annotated[int, typer.Option(min=0, help="of flatquant, over all windows")] = 15,
    tokens: Tokens = 128 * 2048,
    window: Window = 2048,
    text: Text = None,
    backend: Backend = "auto",
) -> None:
    """Round weights, and activations, keys and values, to a few bits.

    rtn: every weight goes to the nearest value of its group's grid; nothing is observed, so it is
    done in seconds. Good at 8 bits, fair at 4, of no use at 3. Beside it, other methods are judged.

    awq (arXiv 2306.00978): channels that meet large activations are scaled up before rounding and
    down in what feeds them, so that their weights lose less. Of 20 powers of the mean activation
    the one is taken that leaves the outputs nearest. Weights alone are changed: for W4A16.

    gptq (arXiv 2210.17323): columns are rounded one after the other, those that matter most first,
    and the columns still to come make up for the error as the inputs of calibration text have it.
    The method for 3 and 4 bits; it takes the longest, and its calibration text matters most.

    smoothquant (arXiv 2211.10438): channels whose activations are large are divided by a factor,
    and the weights that read them multiplied: one vector for all that reads a norm, experts and
    router alike. What makes activations hard to round then is in the weights: for W8A8.

    flatquant (arXiv 2410.09426): every input passes a matrix, the product of two small ones, that
    the layer's outputs are learned by, with scales by channel and the parts of the largest values
    that are rounded within. The inverse is in the weights, the matrix itself and the clipping stay
    in the model: one for all experts, and the router is not rounded. It takes as long as training
    for a few steps does, and is the method for 4-bit activations: W4A4.

    --rotate (QuaRot, arXiv 2404.00456) goes before any of them: the residual stream is turned by a
    Hadamard matrix that stands in the weights, so that no channel is an outlier. The float model
    computes what it did. It serves few bits of activations: W8A8, W4A8, W4A4.

    `pangu.convert export` writes the result in the layout of compressed-tensors.
    """
    from pangu.compression import quantization
    from pangu.compression.texts import Texts

    texts = Texts(calibration, tokens, window, text)
    rounding = quantization.Rounding(scheme, method.value, group_size, keys.value, rotate, epochs)
    _say(quantization.quantize(model, out, rounding, texts, backend, progress_bar), out)


@app.command()
def chain(file: Annotated[Path, typer.Argument(help="YAML: model, out, text, steps")]) -> None:
    """Several methods one after the other, judged before and after each.

    FILE names the model, a folder `out`, a text to judge by, and steps: commands of pangu.compress
    with their options, and `export`. Each step's model stays in `out`. Run again after a stop, it
    goes on with the step that was not finished. The table has size, perplexity and, with `tasks`,
    the accuracy after each.
    """
    from pangu.compression.chain import read_chain, run_chain

    print(run_chain(read_chain(file)))


@app.command()
def carve(
    model: Model,
    experts: Annotated[
        str, typer.Option(help="S3A3E8: of 8 parts 3 serve all tokens, 3 of the rest are chosen")
    ],
    calibration: Calibration,
    out: Out,
    groups: Annotated[
        int, typer.Option(min=1, help="as many are chosen in each of so many groups (MoGE)")
    ] = 1,
    tokens: Tokens = 8 * 2048,
    window: Window = 2048,
    text: Text = None,
    backend: Backend = "auto",
) -> None:
    """CMoE: make experts of a dense model's MLPs, or parts of an MoE's experts, without training.

    Neurons that are among the ten most active ones of many tokens become the shared expert; the
    others fall into experts of equal size by the tokens that activate them, an exact balanced
    clustering. The router is the neuron nearest to the middle of each expert. What is left out per
    token is regained by training on: `pangu.train checkpoint.resume=DIR` moves the balancing bias
    and learns a scale for each expert.
    """
    from pangu.compression import carving
    from pangu.compression.texts import Texts

    texts = Texts(calibration, tokens, window, text)
    table = carving.carve(
        model, out, experts, groups, texts, backend=backend, progress=progress_bar
    )
    _say(table, out)


@app.command("prune-experts")
def prune_experts(
    model: Model,
    task: Annotated[
        list[Path], typer.Option("--task", help="a UTF-8 text file, questions with their answers")
    ],
    keep: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="part of the experts that stays")
    ] = 0.5,
    score: Annotated[Score, typer.Option(help="by what experts are ranked")] = Score.PEU,
    out: Annotated[Path | None, typer.Option("--out", help="a new folder for the model")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="a folder to which each task's scores are added")
    ] = None,
    tokens: Tokens = 2**17,
    window: Window = 2048,
    text: Text = None,
    seed: Annotated[int, typer.Option(min=0, help="of random scores")] = 0,
    backend: Backend = "auto",
) -> None:
    """PreMoe: keep the experts that a task needs, in every layer the same number.

    An expert's score is its mean over the tokens of the task's text: how often it is chosen
    (frequency), or, where the router is sure of it, its logit s (tcess) or max(s, sigmoid(s))
    (peu). Several tasks make a generalist: the mean of their scores. With --store each task's
    scores are kept apart; pangu.generate and pangu.serve read them with patterns=DIR and load the
    experts that suit a prompt.
    """
    if out is None and store is None:
        raise typer.BadParameter("nothing to write: --out DIR, --store DIR or both")
    from pangu.compression import experts
    from pangu.compression.texts import Texts

    tasks = [Texts(file, tokens, window, text, "--task") for file in task]
    choice = experts.Choice(keep, score.value, seed)
    table = experts.prune(model, out, store, choice, tasks, backend=backend, progress=progress_bar)
    _say(table, out)


def _say(table: str, out: Path | None) -> None:
    print(table)
    if out is not None:
        print(f"the model is in {out}: judge it, generate from it, train it on or export it")


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    from configs.violation import ConfigError
    from pangu.checkpoint import WeightsError

    return run(app, arguments, ConfigError, WeightsError)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    sys.exit(main(sys.argv[1:]))
