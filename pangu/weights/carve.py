"""CMoE (arXiv 2502.04416): experts carved out of a dense MLP, without training.

Of each token the ten neurons count whose activation |SiLU(x·gate)·(x·up)| is largest: its marks.
Neurons that are marked most become the shared expert. The others fall into experts of equal size by
which tokens mark them, and one neuron of each, the nearest to its mean, speaks for it in the
router. With all experts on nothing is lost.

Shapes: T tokens, K marks of a token, F neurons (the width of the MLP), M neurons of an expert, E
routed experts, H hidden, G groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from configs.schema import Config, MoEConfig
from pangu.checkpoint.tensor_files import Source, WeightsError
from pangu.inference.forward import Enough, until_enough
from pangu.inference.likelihood import windows
from pangu.weights.balanced import balanced_assignment

Named: TypeAlias = tuple[str, torch.Tensor]
T = TypeVar("T")
MARKS = 10  # the paper's K_a
_ROUNDS = 4  # assignments, each around the means of the one before; the released code has one
_MATRIX = re.compile(r"(decoder\.layers\.\d+\.mlp\.)linear_fc([12])\.weight")


@dataclass(frozen=True)
class Parts:
    """S3A3E8: of 8 equal parts 3 serve every token and 3 of the other 5 are chosen; with `groups`,
    equally many in each of so many groups (MoGE)."""

    shared: int
    active: int
    all: int
    groups: int = 1

    @property
    def routed(self) -> int:
        return self.all - self.shared


@dataclass(frozen=True)
class Carving:
    """Of one layer: the neurons of the shared expert, int64 `[S]`, of each expert `[E, M]`, and the
    neuron that speaks for it `[E]`."""

    shared: np.ndarray
    experts: np.ndarray
    speakers: np.ndarray


def parts_of(text: str, groups: int = 1) -> Parts:
    """Raises:
    WeightsError: `text` is not like S3A3E8, or its numbers do not go together.
    """
    found = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", text)
    if not found:
        reason = "is not like S3A3E8: shared experts, active ones, and all with the shared"
        raise WeightsError(f"--experts {text} {reason}")
    shared, active, every = map(int, found.groups())
    parts = Parts(shared, active, every, groups)
    if not 1 <= parts.active <= parts.routed:
        reason = f"has {parts.routed} routed experts, and a token chooses {parts.active}"
        raise WeightsError(f"--experts {text} {reason}: want 1 at least and no more than there are")
    if parts.routed % groups or parts.active % groups:
        common = math.gcd(parts.routed, parts.active)
        would = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        reason = f"{parts.routed} routed experts and {parts.active} active"
        raise WeightsError(f"--groups {groups} does not divide both {reason}: {would} would do")
    return parts


def carved_config(config: Config, parts: Parts) -> Config:
    """The model with experts. Their learned scale begins at 0, which is weight 1, and the bias that
    balances them at 0.

    Raises:
        WeightsError: there is no such model.
    """
    model = config.model
    width, rest = divmod(model.ffn_hidden_size, parts.all)
    if model.activation != "swiglu" or model.add_mlp_bias or model.mtp_num_layers:
        raise WeightsError(
            "carving takes SwiGLU without biases apart, and no layers of multi-token prediction"
        )
    if rest:
        sizes = [n for n in range(2, 65) if model.ffn_hidden_size % n == 0]
        reason = f"{model.ffn_hidden_size} neurons do not fall into {parts.all} equal experts"
        raise WeightsError(f"--experts: {reason}; {', '.join(map(str, sizes))} would do")
    moe = MoEConfig(
        router="moge" if parts.groups > 1 else "top_k",
        top_k=parts.active,
        num_expert_groups=parts.groups,
        score_function="gated",
        router_scale=True,
        expert_bias=True,
        aux_loss_coefficient=0.0,
    )
    model = replace(
        model,
        num_experts=parts.routed,
        moe_ffn_hidden_size=width,
        shared_expert_ffn_hidden_size=parts.shared * width,
        ffn_hidden_size=0,
        num_dense_layers=0,
    )
    return replace(config, model=model, moe=moe)


def marks(
    model: GPTModel,
    ids: Sequence[int],
    window: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[np.ndarray]:
    """The `MARKS` neurons of largest activation of every token of a text, int32 `[T, K]`, by layer.
    No more of the activations is kept."""
    last = len(model.decoder.layers) - 1
    found: list[list[np.ndarray]] = [[] for _ in range(last + 1)]

    def note(number: int, h: torch.Tensor) -> None:
        largest = h.detach().abs().flatten(0, -2).topk(min(MARKS, h.size(-1)), sorted=False)
        found[number].append(largest.indices.to(torch.int32).cpu().numpy())
        if number == last:
            raise Enough

    handles = [
        layer.mlp.linear_fc2.register_forward_pre_hook(
            lambda _, args, number=number: note(number, args[0])
        )
        for number, layer in enumerate(model.decoder.layers)
    ]
    try:
        for part in progress(windows(ids, window)):
            until_enough(model, torch.tensor([part]))
    finally:
        for handle in handles:
            handle.remove()
    return [np.concatenate(parts) for parts in found]


def carving_of(marks_TK: np.ndarray, width: int, parts: Parts) -> Carving:
    """What becomes of the `width` neurons of one layer."""
    counts_F = np.bincount(marks_TK.ravel(), minlength=width)
    order = np.argsort(-counts_F, kind="stable")
    size = width // parts.all
    shared, rest = np.sort(order[: parts.shared * size]), np.sort(order[parts.shared * size :])
    expert_R, speakers = _clusters(marks_TK, width, rest, parts.routed)
    experts = np.stack([rest[expert_R == number] for number in range(parts.routed)])
    if parts.groups > 1:
        new = grouped(_marks_by_expert(marks_TK, width, rest, expert_R, parts.routed), parts.groups)
        experts, speakers = experts[new], speakers[new]
    return Carving(shared, experts, speakers)


def mark_costs(
    marks_TK: np.ndarray, place_F: np.ndarray, counts_TE: np.ndarray, size: int
) -> np.ndarray:
    """The L1 distance of every neuron's column of marks to every cluster's mean, times `size`, less
    what is the same for all neurons of a cluster, and so for every balanced assignment: int64
    `[R, E]`. It is the squared Euclidean distance but for such a constant, too.

    `place_F` is each neuron's row, or -1. `counts_TE` are marks by cluster of `size` neurons, whose
    mean is c = counts / size: sum over t of |a - c| = sum of c + sum over marked t of (1 - 2·c).
    """
    tokens, kept = np.nonzero(place_F[marks_TK] >= 0)
    row_N = place_F[marks_TK[tokens, kept]]
    rows = int(place_F.max()) + 1
    return np.stack(
        [
            np.bincount(row_N, weights=size - 2.0 * counts_TE[tokens, e], minlength=rows)
            for e in range(counts_TE.shape[1])
        ],
        axis=1,
    ).astype(np.int64)


def _clusters(
    marks_TK: np.ndarray, width: int, rest: np.ndarray, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each neuron of `rest`, `[R]`, and the neuron nearest to each one's mean, `[E]`.

    Means begin at the neurons that are marked most."""
    place_F = np.full(width, -1)
    place_F[rest] = np.arange(len(rest))
    counts_R = np.bincount(marks_TK.ravel(), minlength=width)[rest]
    seeds = np.argsort(-counts_R, kind="stable")[:experts]
    size = 1
    counts_TE = (marks_TK[:, :, None] == rest[seeds]).sum(axis=1)
    expert_R = np.full(len(rest), -1)
    for _ in range(_ROUNDS):
        before = expert_R
        expert_R = balanced_assignment(mark_costs(marks_TK, place_F, counts_TE, size))
        size = len(rest) // experts
        counts_TE = _marks_by_expert(marks_TK, width, rest, expert_R, experts)
        if (before == expert_R).all():
            break
    costs_RE = mark_costs(marks_TK, place_F, counts_TE, size)
    far = costs_RE.max() + 1
    own = np.where(expert_R[:, None] == np.arange(experts), costs_RE, far)
    return expert_R, rest[own.argmin(axis=0)]


def _marks_by_expert(
    marks_TK: np.ndarray, width: int, rest: np.ndarray, expert_R: np.ndarray, experts: int
) -> np.ndarray:
    """How many marks of each token lie in each expert: `[T, E]`."""
    expert_F = np.full(width, experts)  # the shared expert's
    expert_F[rest] = expert_R
    expert_TK = expert_F[marks_TK]
    return np.stack([(expert_TK == number).sum(axis=1) for number in range(experts)], axis=1)


def grouped(counts_TE: np.ndarray, groups: int) -> np.ndarray:
    """The experts in an order in which every E/G neighbours are a group: those that the same tokens
    mark lie in different groups, for a token takes equally many of each. Pairs change places as
    long as this makes the marks that meet inside groups fewer."""
    experts = counts_TE.shape[1]
    together = counts_TE.T.astype(np.int64) @ counts_TE
    group = np.arange(experts) * groups // experts

    def inside(group: np.ndarray) -> int:
        same = group[:, None] == group
        return int((together * same).sum())

    least, found = inside(group), True
    while found:
        found = False
        for a in range(experts):
            for b in range(a):
                swapped = group.copy()
                swapped[[a, b]] = group[[b, a]]
                if inside(swapped) < least:
                    group, least, found = swapped, inside(swapped), True
    return np.argsort(group, kind="stable")


def carved_tensors(source: Source, carvings: Mapping[str, Carving]) -> Iterator[Named]:
    """Every tensor of the carved model; `carvings` are by the prefix of a layer's MLP
    (`decoder.layers.3.mlp.`)."""
    return rewritten(source, _MATRIX, carvings, (_carved_first, _carved_second))


def rewritten(
    source: Source,
    matrices: re.Pattern[str],
    carvings: Mapping[str, T],
    ways: Sequence[Callable[[str, torch.Tensor, T], Iterator[Named]]],
) -> Iterator[Named]:
    """Every tensor, and in the place of those that `matrices` names, by a layer's prefix and 1 or
    2, what the first or the second of `ways` makes of it and of the layer's carving."""
    for name in source.names():
        found = matrices.fullmatch(name)
        if found:
            yield from ways[int(found[2]) - 1](found[1], source.read(name), carvings[found[1]])
        else:
            yield name, source.read(name)


def _carved_first(prefix: str, weight: torch.Tensor, carving: Carving) -> Iterator[Named]:
    """`linear_fc1` `[2·F, H]`, gate before up: experts' `[E, H, 2, M]`, and the router."""
    weight_2FH = weight.unflatten(0, (2, -1))
    if len(carving.shared):
        shared = weight_2FH[:, torch.from_numpy(carving.shared)].flatten(0, 1)
        yield f"{prefix}shared_experts.linear_fc1.weight", shared
    experts_2EMH = weight_2FH[:, torch.from_numpy(carving.experts)]
    yield f"{prefix}experts.w1", experts_2EMH.permute(1, 3, 0, 2).contiguous()
    gate_EH, up_EH = weight_2FH[:, torch.from_numpy(carving.speakers)]
    yield f"{prefix}router.weight", gate_EH.contiguous()
    yield f"{prefix}router.up_weight", up_EH.contiguous()
    experts = len(carving.speakers)
    yield f"{prefix}router.router_scale", torch.zeros(experts, dtype=weight.dtype)
    yield f"{prefix}router.expert_bias", torch.zeros(experts)


def _carved_second(prefix: str, weight_HF: torch.Tensor, carving: Carving) -> Iterator[Named]:
    """`linear_fc2` `[H, F]`: experts' `[E, M, H]`."""
    if len(carving.shared):
        shared = weight_HF[:, torch.from_numpy(carving.shared)].contiguous()
        yield f"{prefix}shared_experts.linear_fc2.weight", shared
    experts_HEM = weight_HF[:, torch.from_numpy(carving.experts)]
    yield f"{prefix}experts.w2", experts_HEM.permute(1, 2, 0).contiguous()
