"""Pruning layers from end to end: measure, choose, write, judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.schema import Config
from pangu.compression.texts import (
    Progress,
    Texts,
    judge,
    refuse_broken,
    refuse_existing,
    table,
)
from pangu.trained_model import loaded

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from pangu.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """How many layers, what leads over the gap, and the first of them where it is given."""

    layers: int
    patch: Literal["none", "diagonal", "hadamard"]
    start: int | None = None


def prune(
    folder: Path, out: Path, choice: Choice, texts: Texts, backend: str, progress: Progress
) -> str:
    """Write the model of `folder` without some layers at `out`; returns a table of both.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: there is no such window of layers, a weight is not finite, or `out` cannot be
            written; nothing is left there.
    """
    refuse_existing(out)
    with loaded(folder, backend) as (model, tokenizer, config):
        from pangu.weights.prune_layers import check_window

        check_window(config, choice.layers, choice.start)
        refuse_broken(model, folder)
        rows = [judge("before", model, tokenizer, config, texts, progress)]
        _write(folder, out, choice, _measured(model, tokenizer, config, choice, texts, progress))
    with loaded(out, backend) as (model, tokenizer, config):
        rows.append(judge(f"patch {choice.patch}", model, tokenizer, config, texts, progress))
    return table(rows, texts)


def _measured(
    model: GPTModel,
    tokenizer: Tokenizer,
    config: Config,
    choice: Choice,
    texts: Texts,
    progress: Progress,
) -> tuple[int, torch.Tensor | None]:
    """The first layer to leave out, and P (None: nothing leads over the gap)."""
    from pangu.weights import prune_layers

    layers = choice.layers
    rotation = None
    if choice.patch == "hadamard":
        rotation = prune_layers.rotation(config.model.hidden_size)
    statistics = prune_layers.measure(
        model,
        texts.calibration_ids(tokenizer),
        layers=layers,
        window=texts.window_of(config),
        rotation=rotation,
        progress=progress,
    )
    start = statistics.best if choice.start is None else choice.start
    _say_scores(statistics.similarity, layers, start)
    if choice.patch == "none" or not layers:
        return start, None
    return start, prune_layers.patch_matrix(statistics, start, layers, rotation)


def _say_scores(similarity: list[float], layers: int, start: int) -> None:
    print(f"mean cosine between the two ends of every window of {layers} layers:")
    for first, value in enumerate(similarity):
        print(
            f"  {first:3} to {first + layers - 1:3}  {value:.4f}{'  left out' * (first == start)}"
        )


def _write(folder: Path, out: Path, choice: Choice, found: tuple[int, torch.Tensor | None]) -> None:
    from pangu.weights import model_folder, prune_layers

    start, patch = found
    path, config, source = model_folder.opened(folder)
    after = prune_layers.pruned_config(config, start, choice.layers, patched=patch is not None)
    tensors = prune_layers.pruned_tensors(source, start, choice.layers, patch)
    model_folder.write(out, after, tensors, made_of=path)
