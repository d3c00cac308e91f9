"""A model quantised layer by layer: each layer is observed on what the layers before it, already
quantised, make of the calibration text.

Shapes: S sequence, B batch, H hidden, F width of an expert, E experts, R rows, C columns, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from pangu.inference.forward import Enough, until_enough
from pangu.moe.experts import GroupedExperts
from pangu.ops.grouped_matmul import grouped_matmul
from pangu.ops.swiglu import swiglu
from pangu.weights import flatquant
from pangu.weights.gptq import gptq
from pangu.weights.quantize import Grid, Scheme, grid_of, rounded
from pangu.weights.readers import matrices, norm_readers
from pangu.weights.smoothing import awq_scales, smooth_scales

Tensor = torch.Tensor
_DENSE = ("mlp", "mlp.shared_experts")  # where MLPs stand
Method = Literal["rtn", "awq", "gptq", "smoothquant", "flatquant"]


@dataclass
class Inputs:
    """What has come into a matrix: sums over tokens of x·xᵀ `[C, C]` and |x| `[C]`, the largest |x|
    `[C]`, and how many tokens."""

    gram: Tensor
    total: Tensor
    largest: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, width: int, device: torch.device) -> Inputs:
        gram = torch.zeros(width, width, device=device)
        return cls(gram, torch.zeros(width, device=device), torch.zeros(width, device=device))

    def add(self, x: Tensor) -> None:
        x = x.detach().float().flatten(0, -2)
        if len(x):
            self.gram += x.T @ x
            self.total += x.abs().sum(0)
            self.largest = torch.maximum(self.largest, x.abs().amax(0))
            self.tokens += len(x)

    def divide(self, scales: Tensor) -> None:
        """From now on, what came in was divided by `scales` `[C]`."""
        self.gram /= torch.outer(scales, scales)
        self.total /= scales
        self.largest /= scales


@dataclass
class Quantizer:
    """Method, scheme, and the dtype that weights and scales will be stored in.

    `grids` are by the name of the weight, in its own layout with groups in the place of inputs.
    `epochs` are those of flatquant, over all windows for each layer.
    """

    method: Method
    scheme: Scheme
    stored: torch.dtype
    epochs: int = 0
    grids: dict[str, Grid] = field(default_factory=dict)
    key_limits: dict[str, Tensor] = field(default_factory=dict)  # of KVQuant, float32, by name

    def run(
        self,
        model: GPTModel,
        windows: list[Tensor],
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> None:
        """Round every linear of the decoder's layers, in place. `windows` are token ids `[S]`, none
        of them where nothing is observed (rounding to nearest).

        Routers, norms, embeddings, head, patches and multi-token prediction stay as they are.
        """
        with torch.no_grad():
            calls = [_call(model, ids) for ids in windows]
            for number, layer in enumerate(progress(list(model.decoder.layers))):
                prefix = f"decoder.layers.{number}."
                if self.scheme.weight_bits < 16:
                    self._round_weights(layer, prefix, calls)
                with self._key_limits(layer, f"{prefix}self_attention."):
                    for call in calls:
                        call["hidden_states"] = layer(**call)[0]

    def _round_weights(self, layer: Any, prefix: str, calls: list[dict[str, Any]]) -> None:
        if self.method == "flatquant":
            found = flatquant.learn(layer, calls, self.scheme, self.stored, self.epochs)
            self.grids |= {prefix + name: grid for name, grid in found.items()}
            return
        observes = [] if self.method == "rtn" else calls
        seen = _observed(layer, observes, experts=self.method in ("awq", "gptq"))
        if self.method in ("awq", "smoothquant"):
            self._smooth(layer, seen)
        self._round(layer, prefix, seen)

    @contextlib.contextmanager
    def _key_limits(self, layer: Any, prefix: str) -> Iterator[None]:
        """Where keys are rounded by channel, note the limits of those that pass, before their
        rotation."""
        if not self.scheme.by_channel:
            yield
            return
        least, most = [], []

        def look(_: Any, __: Any, key: Tensor) -> None:
            low, high = key.float().flatten(0, 1).aminmax(dim=0)
            least.append(low)
            most.append(high)

        handle = layer.self_attention.k_layernorm.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()
        low, high = torch.stack(least).amin(0), torch.stack(most).amax(0)
        self.key_limits[f"{prefix}key_low"] = low
        self.key_limits[f"{prefix}key_step"] = (high - low) / (2**self.scheme.kv_bits - 1)

    def _smooth(self, layer: Any, seen: dict[str, Inputs]) -> None:
        """Scale the channels that the norms feed, and what reads them; with AWQ, those between the
        two products of each MLP too."""
        names = dict(layer.named_parameters())
        for found in norm_readers(layer):
            readers = [
                part
                for name in found.rounded
                for part in zip(
                    matrices(name, names[name]), _inputs(name, names[name], seen), strict=True
                )
            ]
            exact = [names[name] for name in found.exact]
            self._fold(getattr(layer, found.norm), readers, exact, seen[found.seen])
        if self.method != "awq" or not layer.config.gated_linear_unit:
            return
        for name, module in layer.named_modules():
            if name in _DENSE and hasattr(module, "linear_fc2"):
                first, second = module.linear_fc1, module.linear_fc2
                ups = [part for part in (first.weight, first.bias) if part is not None]
                ups = [part[len(part) // 2 :] for part in ups]
                self._scale_between(ups, second.weight, seen[f"{name}.linear_fc2"])
            elif isinstance(module, GroupedExperts):
                inputs = _inputs(f"{name}.w2", module.w2, seen)
                for w1, w2, each in zip(module.w1, module.w2, inputs, strict=True):
                    self._scale_between([w1[:, 1].T], w2.T, each)

    def _scale_between(self, ups: list[Tensor], down: Tensor, inputs: Inputs) -> None:
        """Divide the rows of `ups`, on which the inputs of `down` `[R, C]` depend linearly, by
        scales, and multiply its columns by them."""
        if inputs.tokens < down.size(1):  # too few to say which channels are large
            return
        scales = self._scales([(down, inputs)], [], inputs)
        for up in ups:
            up /= scales.view(-1, *[1] * (up.dim() - 1))
        down *= scales
        inputs.divide(scales)

    def _fold(
        self, norm: Any, readers: list[tuple[Tensor, Inputs]], exact: list[Tensor], inputs: Inputs
    ) -> None:
        """Divide what `norm` gives by scales, and multiply `readers` and `exact` (which are not
        rounded) by them; they are matrices `[R, C]`, with what each has seen."""
        scales = self._scales(readers, exact, inputs)
        for part in (norm.weight, norm.bias):
            if part is not None:
                part /= scales
        for weight in [*(weight for weight, _ in readers), *exact]:
            weight *= scales
        for each in {id(one): one for one in [inputs, *(saw for _, saw in readers)]}.values():
            each.divide(scales)

    def _scales(
        self, readers: list[tuple[Tensor, Inputs]], exact: list[Tensor], inputs: Inputs
    ) -> Tensor:
        if self.method == "smoothquant":
            return smooth_scales([*(weight for weight, _ in readers), *exact], inputs.largest)
        size = inputs.total / max(inputs.tokens, 1)
        products = [(weight, saw.gram) for weight, saw in readers]
        return awq_scales(products, size, self.scheme, self.stored)

    def _round(self, layer: Any, prefix: str, seen: dict[str, Inputs]) -> None:
        for name, module in layer.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                values, grid = self._rounded(module.weight, seen.get(name))
                module.weight.copy_(values)
                self.grids[f"{prefix}{name}.weight"] = grid
            elif isinstance(module, GroupedExperts):
                self._round_experts(module, f"{prefix}{name}.", seen, name)

    def _round_experts(
        self, experts: GroupedExperts, prefix: str, seen: dict[str, Inputs], name: str
    ) -> None:
        into, out = [], []
        for number, rows in enumerate(matrices("experts.w1", experts.w1)):
            values, grid = self._rounded(rows, seen.get(f"{name}.w1.{number}"))
            rows.copy_(values)
            into.append(grid)
            down = experts.w2[number].T
            values, grid = self._rounded(down, seen.get(f"{name}.w2.{number}"))
            down.copy_(values)
            out.append(grid)
        self.grids[f"{prefix}w1"] = _stacked(
            into, lambda part: part.unflatten(1, (2, -1)).permute(0, 3, 1, 2)
        )
        self.grids[f"{prefix}w2"] = _stacked(out, lambda part: part.transpose(1, 2))

    def _rounded(self, weight_RC: Tensor, inputs: Inputs | None) -> tuple[Tensor, Grid]:
        if self.method == "gptq" and inputs is not None and inputs.tokens:
            return gptq(weight_RC, inputs.gram, self.scheme, self.stored)
        clip = self.method == "awq" and inputs is not None and inputs.tokens >= weight_RC.size(1)
        gram = inputs.gram if clip and inputs is not None else None
        grid = grid_of(weight_RC, self.scheme, self.stored, clip=clip, gram_CC=gram)
        return rounded(weight_RC, grid, self.scheme), grid


def widths(model: GPTModel) -> set[int]:
    """Columns of every matrix that is rounded."""
    found: set[int] = set()
    for module in model.decoder.layers.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            found.add(module.weight.size(1))
        elif isinstance(module, GroupedExperts):
            found |= {module.w1.size(1), module.w2.size(1)}
    return found


def _inputs(name: str, weight: Tensor, seen: dict[str, Inputs]) -> list[Inputs]:
    """What each of the `matrices` of a weight has seen; where nobody looked inside experts, what
    came into all of them."""
    if name.endswith(("experts.w1", "experts.w2")):
        numbers = range(len(weight))
        return [seen.get(f"{name}.{number}", seen["mlp"]) for number in numbers]
    return [seen[name.removesuffix(".weight")]]


def _stacked(grids: list[Grid], layout: Callable[[Tensor], Tensor]) -> Grid:
    """Grids of all experts, `[E, R, G]`, laid out as the weight is."""
    scale = layout(torch.stack([grid.scale for grid in grids]))
    return Grid(scale, layout(torch.stack([grid.zero for grid in grids])))


def _call(model: GPTModel, ids_S: Tensor) -> dict[str, Any]:
    """What the first layer is called with."""
    found: dict[str, Any] = {}

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)
        if args:
            found["hidden_states"] = args[0]
        raise Enough

    handle = model.decoder.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        until_enough(model, ids_S[None])
    finally:
        handle.remove()
    return found


def _observed(layer: Any, calls: list[dict[str, Any]], *, experts: bool) -> dict[str, Inputs]:
    """Run the layer on all `calls`, and look at what comes into its matrices, by module; into
    `mlp` as a whole; and, where `experts`, into both matrices of every expert. Of one that fewer
    tokens came by than its inputs are wide, the first matrix is judged by what came into `mlp`."""
    seen: dict[str, Inputs] = {}

    def look(name: str, x: Tensor) -> None:
        if name not in seen:
            seen[name] = Inputs.of(x.size(-1), x.device)
        seen[name].add(x)

    def look_inside(name: str, module: GroupedExperts, args: tuple) -> None:
        rows, counts, weights = args
        inner = grouped_matmul(rows, module.w1.flatten(2), counts, parameter=module.w1)
        active = swiglu(inner, weights)
        for number, part in enumerate(rows.split(counts.tolist())):
            look(f"{name}.w1.{number}", part)
        for number, part in enumerate(active.split(counts.tolist())):
            look(f"{name}.w2.{number}", part)

    handles = []
    for name, module in layer.named_modules():
        if name == "mlp" or isinstance(module, ColumnParallelLinear | RowParallelLinear):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
            )
        elif experts and isinstance(module, GroupedExperts):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, name=name: look_inside(name, module, args)
                )
            )
    try:
        for call in calls:
            layer(**call)
    finally:
        for handle in handles:
            handle.remove()
    for name in [name for name in seen if ".experts.w1." in name]:
        if seen[name].tokens < len(seen[name].total):
            seen[name] = seen["mlp"]
    return seen
