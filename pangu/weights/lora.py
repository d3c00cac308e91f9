"""A model with adapters as the plain model that computes the same: W + α/r · B·A."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from configs.schema import Config, ModelConfig
from pangu.checkpoint.tensor_files import Source

_A, _B = ".lora_a", ".lora_b"
_OF_EXPERTS = "_adapter"  # `experts.w1_adapter.lora_a` stands beside `experts.w1`


class _Merged:
    """The tensors of `source` but for its adapters, which are in the weights."""

    def __init__(self, source: Source, scale: float) -> None:
        self._source, self._scale = source, scale
        self._names = list(source.names())
        self._adapted = {name.removesuffix(_A) for name in self._names if name.endswith(_A)}

    def names(self) -> Iterable[str]:
        return [name for name in self._names if not name.endswith((_A, _B))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        weight = self._source.read(name)
        if name + _OF_EXPERTS in self._adapted:
            a, b = self._matrices(name + _OF_EXPERTS)  # [E, inputs, r], [E, r, …outputs]
            product = (a @ b.flatten(2)).view(weight.shape)
        elif name.endswith(".weight") and (linear := name.removesuffix(".weight")) in self._adapted:
            a, b = self._matrices(linear)
            product = b @ a
        else:
            return weight
        return (weight.double() + self._scale * product).to(weight.dtype)

    def _matrices(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (self._source.read(adapter + part).double() for part in (_A, _B))
        return a, b


def merged(config: Config, source: Source) -> tuple[Config, Source]:
    """Configuration and tensors without adapters, in the stored dtype; the same where there are
    none."""
    model = config.model
    if not model.lora_rank:
        return config, source
    plain = {name: getattr(ModelConfig("", 1, 1, 1, 1), name) for name in _KEYS}
    scale = model.lora_alpha / model.lora_rank
    return replace(config, model=replace(model, **plain)), _Merged(source, scale)


_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules")
