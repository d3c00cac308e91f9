"""What a quantised model's folder holds beside its weights, which are the values that the codes
stand for: the grids from which codes are read again.

    quantization.safetensors    NAME.scale and NAME.zero for each quantised weight NAME, and the
                                scheme in its header

Both are laid out as the weight is, with groups in the place of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.compose import read_file
from pangu.checkpoint import model_files
from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights import model_folder
from pangu.weights.quantize import Grid, Scheme

FILE = model_files.CODES


def save(folder: Path, scheme: Scheme, grids: Mapping[str, Grid], stored: torch.dtype) -> None:
    """Write the file; scales are in `stored`, in which they have been rounded before."""
    tensors = {}
    for name, grid in grids.items():
        tensors[f"{name}.scale"] = grid.scale.to(stored).cpu().contiguous()
        if not scheme.symmetric:
            tensors[f"{name}.zero"] = grid.zero.to(torch.int8).cpu().contiguous()
    save_file(tensors, folder / FILE, {key: str(value) for key, value in asdict(scheme).items()})


def copy(
    source: Path,
    target: Path,
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None] = lambda *same: same,
) -> None:
    """Write the file of a model's folder `source` into `target`, each tensor under the name and as
    `change` makes it, or (None) not at all; nothing where the model is not quantised."""
    if not (source / FILE).is_file():
        return
    with safe_open(source / FILE, framework="pt") as file:
        header, names = file.metadata(), list(file.keys())
        changed = (change(name, file.get_tensor(name)) for name in names)
        tensors = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
    save_file(tensors, target / FILE, header)


def refuse(folder: Path, reason: str) -> None:
    """Raises:
    WeightsError: the model in `folder` is quantised, or was and has transforms of inputs still,
        which `reason` says why it may not be.
    """
    if (codes := Quantized.of(folder)) is not None:
        raise WeightsError(f"{folder} is quantised already ({codes.scheme.name}): {reason}")
    config = folder / model_folder.CONFIG
    if config.is_file() and read_file(config, "model").model.input_transforms:
        raise WeightsError(f"{folder} has model.input_transforms of a quantised model: {reason}")


class Quantized:
    """The grids of a folder, read when asked for; None where `of` finds none.

    Raises:
        WeightsError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                self.weights = {key.removesuffix(".scale") for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} is damaged or incomplete: {error}") from None
        self.weights = {name for name in self.weights if not name.endswith(".zero")}
        try:
            self.scheme = Scheme(
                header["name"],
                int(header["weight_bits"]),
                int(header["activation_bits"]),
                int(header["group_size"]),
                symmetric=header["symmetric"] == "True",
                kv_bits=int(header.get("kv_bits", 0)),
                floats=header.get("floats") == "True",
            )
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path} names no scheme") from None

    @classmethod
    def of(cls, folder: Path) -> Quantized | None:
        """The file of a model's folder; None where the model is not quantised."""
        path = folder / FILE
        return cls(path) if path.is_file() else None

    def parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale, in its stored dtype, and zero, int8, of a weight."""
        with safe_open(self._path, framework="pt") as file:
            scale = file.get_tensor(f"{name}.scale")
            if self.scheme.symmetric:
                return scale, torch.zeros(scale.shape, dtype=torch.int8)
            return scale, file.get_tensor(f"{name}.zero")


def weight_bytes(folder: Path) -> int:
    """What the weights of a model's folder, or of a run's newest checkpoint, take: those that are
    quantised in the bits of their scheme, scales among them, others as they are stored."""
    path, _, source = model_folder.opened(folder)
    codes = Quantized.of(path)
    total = 0.0
    for name in source.names():
        if codes is not None and name in codes.weights:
            total += math.prod(source.shape(name)) * codes.scheme.bits_per_weight / 8
        else:
            tensor = source.read(name)
            total += tensor.numel() * tensor.element_size()
    return round(total)
