"""The building blocks of a pipeline stage, each with everything it does to one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulator.array import Array
from simulator.counts.attention import attention
from simulator.counts.mlp import dense_mlp
from simulator.counts.moe import moe, routed_rows
from simulator.counts.records import Counts, Saved, Shapes, grouped_matmul, matmul, vector
from simulator.counts.tensor_parallel import after_row, before_column
from simulator.counts.vocabulary import embedding, head, mtp_entrance
from simulator.parameters import (
    LayerKind,
    Linear,
    adapters,
    expert_adapters,
    mtp_kind,
    patch_linear,
)


def layer(s: Shapes, kind: LayerKind, load: Array = 1.0) -> Counts:
    """One transformer layer."""
    counts = attention(s) + (dense_mlp(s) if kind == "dense" else moe(s, load))
    counts = _side_by_side(counts) if s.traits.parallel_block and kind == "dense" else counts
    beside = low_rank(s, kind) + (expert_low_rank(s, load) if kind == "moe" else [])
    return sum(beside, _frozen(s, counts))


def _frozen(s: Shapes, counts: Counts) -> Counts:
    """What is left of `counts` where adapters alone are trained: no gradients of weights."""
    if not s.model.lora_rank:
        return counts
    return replace(
        counts,
        operators=[each for each in counts.operators if each.phase != "weight_gradient"],
        messages=[each for each in counts.messages if each.phase != "weight_gradient"],
    )


def low_rank(s: Shapes, kind: LayerKind) -> list[Counts]:
    """The adapters of a layer (LoRA). What they multiply is kept once more only where it is `rank`
    wide: the linear beside them keeps its input."""
    tp, rank = s.layout.tp, s.model.lora_rank
    found = []
    for a, b in adapters(s.model, kind):
        row = a.split == "row"  # of its inputs this rank has a part, else of the sequence
        before, after = (s.tokens, s.shard) if row else (s.shard, s.tokens)
        output = after * b.local_outputs(tp) * s.element
        around = after_row if row else before_column
        found.append(
            Counts(
                operators=[
                    *matmul(s, a, before, tp),
                    *matmul(s, b, after, tp),
                    *vector(f"{b.name} added", 5 * output, 2 * output),
                ],
                messages=around(s, b.name, rank) if a.split != b.split else [],
                saved=[Saved(f"{b.name} input", after * rank * s.linear_element)],
            )
        )
    return found


def expert_low_rank(s: Shapes, load: Array) -> list[Counts]:
    """The adapters of routed experts. Between expert-tensor-parallel ranks half of their matrices
    are gathered, which is not counted: they are `rank` wide."""
    rows, experts = routed_rows(s, load), s.model.num_experts / s.layout.ep
    etp, found = s.layout.etp, []
    for a, b in expert_adapters(s.model):
        output = rows * b.local_outputs(etp) * s.element
        products = [grouped_matmul(s, one, experts, rows / experts, etp) for one in (a, b)]
        found.append(
            Counts(
                operators=[
                    *products[0],
                    *products[1],
                    *vector(f"{b.name} added", 5 * output, 2 * output),
                ],
                saved=[Saved(f"{b.name} input", rows * s.model.lora_rank * s.linear_element)],
            )
        )
    return found


# What attention and MLP have in common where they stand side by side: the norm and its output,
# gathered once, and the sum of both, reduced once.
COMMON: tuple[str, ...] = ("mlp.norm", "attention.residual", "mlp.fc1 input", "mlp.fc1 gradient")
COMMON += ("attention.proj output",)


def _side_by_side(counts: Counts) -> Counts:
    """A dense layer whose attention and MLP read the same norm."""
    return replace(
        counts,
        operators=[each for each in counts.operators if not each.name.startswith(COMMON)],
        messages=[each for each in counts.messages if not each.name.startswith(COMMON)],
        saved=[each for each in counts.saved if not each.name.startswith(COMMON)],
    )


@dataclass(frozen=True)
class Blocks:
    """What stages are made of. `mtp` are all multi-token-prediction modules; `head` includes their
    use of the output projection, and the leap heads."""

    dense: Counts | None
    moe: Counts | None
    embedding: Counts
    mtp: Counts | None
    head: Counts
    patch: Counts | None = None


def layer_patch(s: Shapes) -> Counts:
    """The linear before a layer that stands behind pruned ones; every tensor-parallel rank has all
    of it, and multiplies its part of the sequence."""
    linear = patch_linear(s.model)
    return Counts(
        operators=matmul(s, linear, s.shard, 1),
        saved=[Saved("layer_patch input", s.shard * s.model.hidden_size * s.linear_element)],
        matrices={linear.name: linear.matrix()},
    )


def leap_step(s: Shapes) -> Counts:
    """A leap head's square matrix, which every tensor-parallel rank has all of."""
    hidden = s.model.hidden_size
    linear = Linear("leap_head", hidden, hidden, "replicated")
    return Counts(
        operators=matmul(s, linear, s.shard, 1),
        saved=[Saved("leap_head output", 2 * s.shard * hidden * s.element)],
        matrices={linear.name: linear.matrix()},
    )


def blocks(s: Shapes, load: Array = 1.0) -> Blocks:
    model = s.model
    dense = moe_layer = None
    if not model.num_experts or model.num_dense_layers:
        dense = layer(s, "dense")
    if model.num_experts:
        moe_layer = layer(s, "moe", load)
    end = head(s)
    mtp = None
    for _ in range(model.mtp_num_layers):
        inside = moe_layer if mtp_kind(model) == "moe" else dense
        assert inside is not None
        module = _frozen(s, mtp_entrance(s)) + inside
        mtp = module if mtp is None else mtp + module
        end = end + head(s)
    for _ in range(1, model.leap_heads):
        end = end + leap_step(s) + head(s)
    patch = _frozen(s, layer_patch(s)) if model.patched_layers else None
    entrance, end = _frozen(s, embedding(s)), _frozen(s, end)
    return Blocks(dense, moe_layer, entrance, mtp, end, patch)
