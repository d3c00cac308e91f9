"""Pruning layers from end to end: measure, choose, write, judge."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pangu.compression.texts import MODEL, Progress, Texts, judge, new_model, refuse_broken, table
from pangu.trained_model import Trained, loaded, read_run_config

if TYPE_CHECKING:
    import torch


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
    with new_model(out) as work:
        pruned = work / MODEL
        config = read_run_config(folder)  # what is wrong is said before the model is read
        from pangu.weights.prune_layers import check_taught, check_window

        check_window(config, choice.layers, choice.start)
        if distillation:
            check_taught(config, choice.layers if choice.patch != "none" else 0)
        texts.check()
        with loaded(folder, backend) as trained:
            refuse_broken(trained.model, folder)
            rows = [judge("before", trained, texts, progress)]
            found = measured(trained, choice, texts, progress)
            write(folder, pruned, choice, found)
            if distillation:
                teach(trained, texts, distillation, work, progress)
        with loaded(pruned, backend) as trained:
            rows.append(judge(f"patch {choice.patch}", trained, texts, progress))
            if distillation:
                taught = learn(trained, texts, distillation, work, progress)
                _replace(pruned, taught)
                rows.append(judge("distilled", trained, texts, progress))
    return table(rows, texts)


def _windows(trained: Trained, texts: Texts, distillation: Distillation) -> torch.Tensor:
    """Whole windows `[N, S]` of the text that is distilled on."""
    import torch

    ids = replace(texts, tokens=distillation.tokens).calibration_ids(trained.tokenizer)
    size = min(texts.window_of(trained.config), len(ids))
    return torch.tensor(ids[: len(ids) // size * size]).view(-1, size)


def teach(
    trained: Trained,
    texts: Texts,
    distillation: Distillation,
    work: Path,
    progress: Progress,
) -> None:
    """Leave the whole model's largest logits in `work`."""
    from pangu.weights.distill_patch import store_logits

    ids = _windows(trained, texts, distillation)
    top = min(distillation.top, trained.config.model.vocab_size)
    store_logits(trained.model, ids, top, work, progress)


def learn(
    trained: Trained,
    texts: Texts,
    distillation: Distillation,
    work: Path,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Teach the patches of a pruned model in memory what `teach` has left in `work`: the patches,
    in float32, by name."""
    from pangu.weights.distill_patch import distill

    ids = _windows(trained, texts, distillation)
    return distill(trained.model, ids, work, distillation.learning_rate, progress)


def _replace(pruned: Path, taught: dict[str, torch.Tensor]) -> None:
    """Write the patches `taught` in the place of those of the model at `pruned`."""
    from pangu.weights import model_folder, quantized_file

    path, config, source = model_folder.opened(pruned)
    tensors = (
        (name, taught[name].to(before.dtype) if name in taught else before)
        for name, before in ((name, source.read(name)) for name in source.names())
    )
    distilled = pruned.with_name("distilled")
    copy = partial(quantized_file.copy, path)
    model_folder.write(distilled, config, tensors, made_of=path, beside=copy)
    shutil.rmtree(pruned)
    distilled.rename(pruned)


def measured(
    trained: Trained,
    choice: Choice,
    texts: Texts,
    progress: Progress,
) -> tuple[int, torch.Tensor | None]:
    """The first layer to leave out, and P (None: nothing leads over the gap)."""
    from pangu.weights import prune_layers

    layers = choice.layers
    rotation = None
    if choice.patch == "hadamard":
        rotation = prune_layers.rotation(trained.config.model.hidden_size)
    statistics = prune_layers.measure(
        trained.model,
        texts.calibration_ids(trained.tokenizer),
        layers=layers,
        window=texts.window_of(trained.config),
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
    """Write the model of `folder` without the layers from `found[0]` on, with the patch; of a
    quantised one the codes of what stays."""
    from pangu.weights import model_folder, prune_layers, quantized_file

    start, patch = found
    path, config, source = model_folder.opened(folder)
    after = prune_layers.pruned_config(config, start, choice.layers, patched=patch is not None)
    tensors = prune_layers.pruned_tensors(source, start, choice.layers, patch)

    def grids(target: Path) -> None:
        def kept(name: str, grid: torch.Tensor) -> tuple[str, torch.Tensor] | None:
            new = prune_layers.pruned_name(name, start, choice.layers)
            return (new, grid) if new else None

        quantized_file.copy(path, target, kept)

    model_folder.write(out, after, tensors, made_of=path, beside=grids)
