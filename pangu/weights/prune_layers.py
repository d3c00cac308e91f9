"""LinearPatch (arXiv 2505.24680): leave out n layers that follow each other, and lead the residual
stream over the gap by one linear.

Shapes: S sequence, B batch, H hidden, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel

from configs.schema import Config
from pangu.checkpoint.tensor_files import Source, WeightsError
from pangu.inference.likelihood import text_likelihood
from pangu.weights.hadamard import hadamard

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_PATCH = "layer_patch.weight"


@dataclass(frozen=True)
class Statistics:
    """What the residual stream is before every layer, on calibration text.

    `similarity[l]` is the mean over tokens of the cosine, over channels, between the inputs of
    layers l and l + n: one for every window of n layers that a layer follows. `size` `[L, H]` is
    each input's L1 norm by channel, in the basis of the patch.
    """

    similarity: list[float]
    size: torch.Tensor

    @property
    def best(self) -> int:
        """First layer of the window whose two ends are most alike."""
        return max(range(len(self.similarity)), key=self.similarity.__getitem__)


def rotation(hidden: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix `[H, H]`, float32.

    Raises:
        WeightsError: none of that size is known.
    """
    try:
        return torch.from_numpy(hadamard(hidden)).float()
    except ValueError as error:
        raise WeightsError(f"{error}: take --patch diagonal") from None


def measure(
    model: GPTModel,
    ids: Sequence[int],
    *,
    layers: int,
    window: int,
    rotation: torch.Tensor | None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Statistics:
    """One pass over calibration tokens, in windows of `window`, for windows of `layers` layers.

    Memory beside the model: `layers` + 1 residual streams of one window.
    """
    blocks = model.decoder.layers
    device = next(model.parameters()).device
    sums = torch.zeros(len(blocks), model.config.hidden_size, dtype=torch.float64, device=device)
    cosines = torch.zeros(len(blocks), dtype=torch.float64, device=device)
    turn = None if rotation is None else rotation.to(device)
    recent: dict[int, torch.Tensor] = {}
    tokens = 0

    def look(number: int, hidden_SBH: torch.Tensor) -> None:
        nonlocal tokens
        states = hidden_SBH.detach().float().flatten(0, 1)
        tokens += len(states) if number == 0 else 0
        turned = states if turn is None else states @ turn
        sums[number] += turned.abs().sum(0, dtype=torch.float64)
        recent[number] = states
        if (before := recent.pop(number - layers, None)) is not None:
            cosine = torch.nn.functional.cosine_similarity(before, states, dim=-1)
            cosines[number - layers] += cosine.sum(dtype=torch.float64)

    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: look(number, _stream(args, kwargs)),
            with_kwargs=True,
        )
        for number, block in enumerate(blocks)
    ]
    try:
        text_likelihood(model, ids, window, progress)
    finally:
        for handle in handles:
            handle.remove()
    windows = len(blocks) - layers
    similarity = (cosines[:windows] / tokens).tolist() if layers else [1.0] * windows
    return Statistics(similarity, sums.cpu())


def _stream(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def patch_matrix(
    statistics: Statistics, start: int, layers: int, rotation: torch.Tensor | None
) -> torch.Tensor:
    """P `[H, H]`, float32: B·diag(d)·Bᵀ with B = `rotation`, or diag(d) without; d_k is how much
    larger the k-th coordinate is after the window than before it."""
    before, after = statistics.size[start], statistics.size[start + layers]
    ratio = torch.where(before > 0, after / before.clamp(min=1e-30), torch.ones_like(before))
    if rotation is None:
        return torch.diag(ratio).float()
    turn = rotation.double()
    return (turn * ratio @ turn.T).float()


def pruned_config(config: Config, start: int, layers: int, *, patched: bool) -> Config:
    """The model without `layers` layers from `start` on."""
    model = config.model
    dense = len(set(range(model.num_dense_layers)) - set(range(start, start + layers)))
    outside = [n for n in model.patched_layers if not _inside(n, start, layers)]
    kept = {n if n < start else n - layers for n in outside}
    if patched:
        kept.add(start)
    return replace(
        config,
        model=replace(
            model,
            num_layers=model.num_layers - layers,
            num_dense_layers=dense,
            patched_layers=sorted(kept),
        ),
    )


def _inside(layer: int, start: int, layers: int) -> bool:
    return start <= layer < start + layers


def pruned_name(name: str, start: int, layers: int) -> str | None:
    """What a tensor is called when the layers are gone; None: it goes with them."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    number = int(match[1])
    if _inside(number, start, layers):
        return None
    return f"decoder.layers.{number - layers * (number >= start)}.{match[2]}"


def pruned_tensors(
    source: Source, start: int, layers: int, patch: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `pruned_config`'s model, one at a time. Where the layer after the window has a
    patch from before, the two become one."""
    ours = None if patch is None else patch.T.contiguous()
    stored = torch.float32
    for name in source.names():
        new = pruned_name(name, start, layers)
        if new is None:
            continue
        tensor = source.read(name)
        if name == f"decoder.layers.{start + layers}.{_PATCH}" and ours is not None:
            ours = (tensor.double() @ ours.double()).to(tensor.dtype)
            continue
        yield new, tensor
        if name == f"decoder.layers.{start + layers}.input_layernorm.weight":
            stored = tensor.dtype
    if ours is not None:
        yield f"decoder.layers.{start}.{_PATCH}", ours.to(stored)


def check_window(config: Config, layers: int, start: int | None) -> None:
    """Whether the model has such a window, and a layer after it that takes the patched stream.

    Raises:
        WeightsError: it has not.
    """
    depth = config.model.num_layers
    if layers >= depth:
        raise WeightsError(f"--layers {layers}: the model has {depth}, at most {depth - 1} can go")
    if start is not None and start + layers >= depth:
        raise WeightsError(
            f"--start {start}: {layers} layers from there leave none of {depth} behind them, "
            f"at most {depth - layers - 1}"
        )


def check_taught(config: Config, patched: int) -> None:
    """Whether there is a patch, from before or over the `patched` layers that go, which
    distillation can teach.

    Raises:
        WeightsError: there is none.
    """
    if not patched and not config.model.patched_layers:
        raise WeightsError(
            "--distill: no patch to teach: --layers 1 or more, --patch diagonal or hadamard"
        )
