"""Carving experts from end to end: mark, cluster, write, judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pangu.compression.texts import MODEL, Progress, Texts, judge, new_model, refuse_broken, table
from pangu.trained_model import Trained, loaded, read_run_config

if TYPE_CHECKING:
    from pangu.weights.carve import Carving, Parts


def carve(
    folder: Path,
    out: Path,
    experts: str,
    groups: int,
    texts: Texts,
    *,
    backend: str,
    progress: Progress,
) -> str:
    """Write the dense model of `folder` with experts such as "S3A3E8" at `out`; returns a table of
    both.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: there are no such experts, the model is quantised, a weight is not finite, or
            `out` cannot be written; nothing is left there.
    """
    with new_model(out) as work:
        config = read_run_config(folder)
        from pangu.weights import quantized_file
        from pangu.weights.carve import carved_config, parts_of

        quantized_file.refuse(folder, "its codes do not fall into experts; carve, then quantise")
        parts = parts_of(experts, groups)
        carved_config(config, parts)  # before the model is read
        with loaded(folder, backend) as trained:
            refuse_broken(trained.model, folder)
            rows = [judge("before", trained, texts, progress)]
            carvings = measured(trained, parts, texts, progress)
        write(folder, work / MODEL, parts, carvings)
        with loaded(work / MODEL, backend) as trained:
            name = f"{experts}, {groups} groups" if groups > 1 else experts
            rows.append(judge(name, trained, texts, progress))
    left = (parts.shared + parts.active) / parts.all
    return f"{table(rows, texts)}\na token runs through {left:.1%} of every MLP"


def measured(
    trained: Trained, parts: Parts, texts: Texts, progress: Progress
) -> dict[str, Carving]:
    """What becomes of the neurons of every layer, by the prefix of its MLP."""
    from pangu.weights.carve import carving_of, marks

    width = trained.config.model.ffn_hidden_size
    ids = texts.calibration_ids(trained.tokenizer)
    found = marks(trained.model, ids, texts.window_of(trained.config), progress)
    return {
        f"decoder.layers.{number}.mlp.": carving_of(marks_TK, width, parts)
        for number, marks_TK in enumerate(progress(found))
    }


def write(folder: Path, out: Path, parts: Parts, carvings: dict[str, Carving]) -> None:
    """Write the model of `folder`, carved, at `out`."""
    from pangu.weights import model_folder
    from pangu.weights.carve import carved_config, carved_tensors

    path, config, source = model_folder.opened(folder)
    tensors = carved_tensors(source, carvings)
    model_folder.write(out, carved_config(config, parts), tensors, made_of=path)
