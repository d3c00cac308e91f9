"""Carving experts from end to end: mark, cluster, write, judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Config
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
    """Write the dense model of `folder` with experts such as "S3A3E8" at `out`, or an MoE with such
    parts of every expert; returns a table of both.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: there are no such experts, the model is quantised, a weight is not finite, or
            `out` cannot be written; nothing is left there.
    """
    with new_model(out) as work:
        config = read_run_config(folder)
        from pangu.weights import quantized_file
        from pangu.weights.carve import parts_of

        quantized_file.refuse(folder, "its codes do not fall into experts; carve, then quantise")
        parts = parts_of(experts, groups)
        carved_config(config, parts)  # before the model is read
        texts.check()
        with loaded(folder, backend) as trained:
            refuse_broken(trained.model, folder)
            rows = [judge("before", trained, texts, progress)]
            carvings = measured(trained, parts, texts, progress)
        write(folder, work / MODEL, parts, carvings)
        with loaded(work / MODEL, backend) as trained:
            name = f"{experts}, {groups} groups" if groups > 1 else experts
            rows.append(judge(name, trained, texts, progress))
    left = (parts.shared + parts.active) / parts.all
    what = "expert that it has" if config.model.num_experts else "MLP"
    return f"{table(rows, texts)}\na token runs through {left:.1%} of every {what}"


def carved_config(config: Config, parts: Parts) -> Config:
    """The carved model's.

    Raises:
        WeightsError: there is none.
    """
    from pangu.weights import carve, carve_experts

    kind = carve_experts if config.model.num_experts else carve
    return kind.carved_config(config, parts)


def measured(
    trained: Trained, parts: Parts, texts: Texts, progress: Progress
) -> dict[str, list[Carving]]:
    """What becomes of the neurons of every layer, by the prefix of its MLP: of the MLP, or of each
    of its experts."""
    from pangu.weights import carve, carve_experts

    model = trained.config.model
    ids, window = texts.calibration_ids(trained.tokenizer), texts.window_of(trained.config)
    if model.num_experts:
        width = model.moe_ffn_hidden_size
        marks = carve_experts.marks(trained.model, ids, window, progress)
    else:
        width = model.ffn_hidden_size
        layers = enumerate(carve.marks(trained.model, ids, window, progress))
        marks = {f"decoder.layers.{number}.mlp.": [found] for number, found in layers}
    return {
        prefix: [carve.carving_of(marks_TK, width, parts) for marks_TK in each]
        for prefix, each in progress(marks.items())
    }


def write(folder: Path, out: Path, parts: Parts, carvings: dict[str, list[Carving]]) -> None:
    """Write the model of `folder`, carved, at `out`."""
    from pangu.weights import carve, carve_experts, model_folder

    path, config, source = model_folder.opened(folder)
    if config.model.num_experts:
        tensors = carve_experts.carved_tensors(source, carvings)
    else:
        tensors = carve.carved_tensors(source, {name: one for name, (one,) in carvings.items()})
    model_folder.write(out, carved_config(config, parts), tensors, made_of=path)
