"""Quantisation from end to end: observe, round, write, judge."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.planning import Dtype, InferenceConfig
from configs.schema import Config, KeyRounding
from pangu.compression.own_text import own_text
from pangu.compression.texts import (
    MODEL,
    OWN,
    Progress,
    Texts,
    judge,
    new_model,
    refuse_broken,
    table,
)
from pangu.trained_model import Trained, loaded

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from pangu.weights.quantize import Scheme
    from pangu.weights.quantize_layers import Method, Quantizer


SMALLEST_GROUP = 8  # below, scales are as large as what they scale


@dataclass(frozen=True)
class Rounding:
    """The scheme by name, the method, the columns of a row that share a scale, how keys are
    rounded where the scheme has KV, whether the model is rotated before, and how often flatquant
    learns from the calibration text."""

    scheme: str
    method: Method
    group_size: int = 128
    keys: KeyRounding = "token"
    rotate: bool = False
    epochs: int = 15

    @property
    def transforms(self) -> bool:
        """Whether the model that is rounded has transforms of its inputs."""
        return self.method == "flatquant"


def quantize(
    folder: Path, out: Path, rounding: Rounding, texts: Texts, backend: str, progress: Progress
) -> str:
    """Write the model of `folder`, quantised, at `out`; returns a table of both.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: the scheme is unknown, the model is quantised already, a weight is not finite,
            or `out` cannot be written; nothing is left there.
    """
    with new_model(out) as work:
        from pangu.weights import quantized_file
        from pangu.weights.quantize import scheme_of

        quantized_file.refuse(folder, "quantise the model that it was made of")
        scheme_of(rounding.scheme, rounding.group_size, set())  # a wrong name is said at once
        texts.check()
        if rounding.rotate:
            folder = rotated(folder, work / "rotated")
        with loaded(folder, backend, input_transforms=rounding.transforms) as trained:
            refuse_broken(trained.model, folder)
            scheme = scheme_for(trained.model, rounding)
            named = texts
            if texts.calibration == OWN:
                written = work / "own text"
                window = texts.window_of(trained.config)
                written.write_text(own_text(trained, texts.tokens, window), encoding="utf-8")
                texts = replace(texts, calibration=written)
            rows = [judge("before", trained, texts, progress)]
            quantizer = rounded(trained, folder, scheme, rounding, texts, progress)
            write(folder, work / MODEL, trained.model, quantizer)
        with loaded(work / MODEL, backend) as trained:
            name = f"{scheme.name} {rounding.method}"
            rows.append(judge(name, trained, texts, progress))
        sizes = [quantized_file.weight_bytes(each) / 1e6 for each in (folder, work / MODEL)]
    groups = f"groups of {scheme.group_size}" if scheme.group_size else "a scale a row"
    bits = f"{scheme.bits_per_weight:.2f} bits a weight of the layers' linears, {groups}"
    size = "{:,.1f} MB of weights, {:,.1f} packed".format(*sizes)
    return f"{table(rows, named)}\n{bits}\n{size}"


def rotated(folder: Path, out: Path) -> Path:
    """Write the model of `folder`, rotated, at `out`: the same function.

    Raises:
        WeightsError: it has no such rotation.
    """
    from pangu.weights import model_folder, rotate

    path, config, source = model_folder.opened(folder)
    after = rotate.rotated_config(config)
    model_folder.write(out, after, rotate.rotated_tensors(config, source), made_of=path)
    return out


def scheme_for(model: GPTModel, rounding: Rounding) -> Scheme:
    """The scheme, with groups that fit all widths of the model.

    Raises:
        WeightsError: there is no such scheme, or not for this model.
    """
    from pangu.checkpoint.tensor_files import WeightsError
    from pangu.weights.quantize import scheme_of
    from pangu.weights.quantize_layers import widths

    found = widths(model)
    scheme = scheme_of(rounding.scheme, rounding.group_size, found, rounding.keys)
    if 0 < scheme.group_size < SMALLEST_GROUP:
        shared = math.gcd(*found)
        would = [str(n) for n in range(SMALLEST_GROUP, shared + 1) if shared % n == 0]
        raise WeightsError(
            f"--group-size {rounding.group_size}, and its half and quarter and so on, does not "
            f"divide all widths of the model ({', '.join(map(str, sorted(found)))}): "
            f"{', '.join(would) or '--scheme W5A16 and more, with a scale a row,'} would do"
        )
    if scheme.by_channel and model.config.multi_latent_attention:
        raise WeightsError("--keys channel: latent attention has no keys before their rotation")
    return scheme


def rounded(
    trained: Trained,
    folder: Path,
    scheme: Scheme,
    rounding: Rounding,
    texts: Texts,
    progress: Progress,
) -> Quantizer:
    """Round the model in memory."""
    import torch

    from pangu.inference.likelihood import windows
    from pangu.weights import model_folder
    from pangu.weights.quantize_layers import Quantizer

    _, _, source = model_folder.opened(folder)
    stored = source.read("embedding.word_embeddings.weight").dtype
    quantizer = Quantizer(rounding.method, scheme, stored, rounding.epochs)
    observes = rounding.method != "rtn" or scheme.by_channel
    ids = texts.calibration_ids(trained.tokenizer) if observes else []
    cut = [torch.tensor(part) for part in windows(ids, texts.window_of(trained.config))]
    quantizer.run(trained.model, cut, progress)
    return quantizer


def write(folder: Path, out: Path, model: GPTModel, quantizer: Quantizer) -> None:
    """Write what has changed in `model` over the model of `folder`, and the grids, at `out`."""
    from pangu.weights import model_folder, quantized_file

    path, config, source = model_folder.opened(folder)
    scheme = quantizer.scheme
    after = replace(
        config,
        model=replace(
            config.model,
            activation_bits=scheme.activation_bits,
            input_transforms=model.config.input_transforms,
            kv_bits=scheme.kv_bits,
            key_rounding=scheme.key_rounding,
        ),
        inference=_served(config, scheme),
    )
    now = dict(model.named_parameters())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in source.names():
            if name.endswith(("key_low", "key_step")):  # of a rounding before
                continue
            before = source.read(name)
            inside = name in now and name.startswith("decoder.layers.")
            yield name, now[name].detach().to(before.dtype).cpu() if inside else before
        yield from quantizer.key_limits.items()
        for name, buffer in model.named_buffers():
            if ".input_rounding." in name:
                yield name, buffer.cpu()

    def grids(target: Path) -> None:
        quantized_file.save(target, scheme, quantizer.grids, quantizer.stored)

    model_folder.write(out, after, tensors(), made_of=path, beside=grids)


def _served(config: Config, scheme: Scheme) -> InferenceConfig:
    """What `simulator infer` prices: the nearest precisions that it knows."""
    served = config.inference
    return replace(
        served,
        weight_dtype="fp4" if scheme.floats else _priced(scheme.weight_bits, served.weight_dtype),
        compute_dtype="int8" if scheme.activation_bits else served.compute_dtype,
        kv_dtype=_priced(scheme.kv_bits or 16, served.kv_dtype),
    )


def _priced(bits: int, before: Dtype) -> Dtype:
    if bits > 8:
        return before
    return "int4" if bits <= 4 else "int8"
