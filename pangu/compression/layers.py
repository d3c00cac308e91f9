"""Pruning layers from end to end: measure, choose, write, judge."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.schema import Config
from pangu.compression.texts import (
    Progress,
    Texts,
    judge,
    move,
    refuse_broken,
    refuse_existing,
    table,
    workplace,
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


@dataclass(frozen=True)
class Distillation:
    """The `top` largest logits of the first `tokens` tokens of the calibration text teach."""

    tokens: int
    top: int = 100
    learning_rate: float = 1e-4


def prune(
    folder: Path,
    out: Path,
    choice: Choice,
    texts: Texts,
    distillation: Distillation | None,
    *,
    backend: str,
    progress: Progress,
) -> str:
    """Write the model of `folder` without some layers at `out`; returns a table of all models.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: there is no such window of layers, a weight is not finite, or `out` cannot be
            written; nothing is left there.
    """
    refuse_existing(out)
    with workplace(out) as work:
        pruned = work / "pruned"
        with loaded(folder, backend) as (model, tokenizer, config):
            from pangu.weights.prune_layers import check_window

            check_window(config, choice.layers, choice.start)
            refuse_broken(model, folder)
            rows = [judge("before", model, tokenizer, config, texts, progress)]
            found = measured(model, tokenizer, config, choice, texts, progress)
            write(folder, pruned, choice, found)
            if distillation:
                teach(model, tokenizer, config, texts, distillation, work, progress)
        with loaded(pruned, backend) as (model, tokenizer, config):
            rows.append(judge(f"patch {choice.patch}", model, tokenizer, config, texts, progress))
            if distillation:
                taught = learn(model, tokenizer, config, texts, distillation, work, progress)
                _replace(pruned, taught)
                rows.append(judge("distilled", model, tokenizer, config, texts, progress))
        move(pruned, out)
    return table(rows, texts)


def _windows(
    tokenizer: Tokenizer, config: Config, texts: Texts, distillation: Distillation
) -> torch.Tensor:
    """Whole windows `[N, S]` of the text that is distilled on."""
    import torch

    ids = replace(texts, tokens=distillation.tokens).calibration_ids(tokenizer)
    size = min(texts.window_of(config), len(ids))
    return torch.tensor(ids[: len(ids) // size * size]).view(-1, size)


def teach(
    model: GPTModel,
    tokenizer: Tokenizer,
    config: Config,
    texts: Texts,
    distillation: Distillation,
    work: Path,
    progress: Progress,
) -> None:
    """Leave the whole model's largest logits in `work`."""
    from pangu.weights.distill_patch import store_logits

    ids = _windows(tokenizer, config, texts, distillation)
    store_logits(model, ids, min(distillation.top, config.model.vocab_size), work, progress)


def learn(
    model: GPTModel,
    tokenizer: Tokenizer,
    config: Config,
    texts: Texts,
    distillation: Distillation,
    work: Path,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Teach the patches of a pruned model in memory what `teach` has left in `work`: the patches,
    in float32, by name."""
    from pangu.weights.distill_patch import distill

    ids = _windows(tokenizer, config, texts, distillation)
    return distill(model, ids, work, distillation.learning_rate, progress)


def _replace(pruned: Path, taught: dict[str, torch.Tensor]) -> None:
    """Write the patches `taught` in the place of those of the model at `pruned`."""
    from pangu.weights import model_folder

    path, config, source = model_folder.opened(pruned)
    tensors = (
        (name, taught[name].to(before.dtype) if name in taught else before)
        for name, before in ((name, source.read(name)) for name in source.names())
    )
    model_folder.write(pruned.with_name("distilled"), config, tensors, made_of=path)
    shutil.rmtree(pruned)
    pruned.with_name("distilled").rename(pruned)


def measured(
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


def write(folder: Path, out: Path, choice: Choice, found: tuple[int, torch.Tensor | None]) -> None:
    """Write the model of `folder` without the layers from `found[0]` on, with the patch."""
    from pangu.weights import model_folder, prune_layers

    start, patch = found
    path, config, source = model_folder.opened(folder)
    after = prune_layers.pruned_config(config, start, choice.layers, patched=patch is not None)
    tensors = prune_layers.pruned_tensors(source, start, choice.layers, patch)
    model_folder.write(out, after, tensors, made_of=path)
