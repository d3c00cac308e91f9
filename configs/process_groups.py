"""Which ranks work together, in megatron-core's order: tensor, context, expert, data, pipeline
parallelism from the nearest ranks to the farthest ("tp-cp-ep-dp-pp")."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Config


@dataclass(frozen=True)
class Axis:
    """One parallel dimension: `size` ranks that are `stride` apart."""

    size: int
    stride: int


def dense_axes(config: Config) -> dict[str, Axis]:
    """Axes of everything but the experts. Needs sizes that divide the ranks."""
    p = config.parallel
    return _axes(
        tp=p.tensor_model_parallel_size,
        cp=p.context_parallel_size,
        dp=config.data_parallel_size,
        pp=p.pipeline_model_parallel_size,
    )


def expert_axes(config: Config) -> dict[str, Axis]:
    """Axes of the experts; `edp` are the replicas of one expert."""
    p = config.parallel
    inner = p.expert_tensor_parallel_size * p.expert_model_parallel_size
    return _axes(
        etp=p.expert_tensor_parallel_size,
        ep=p.expert_model_parallel_size,
        edp=config.world_size // (inner * p.pipeline_model_parallel_size),
        pp=p.pipeline_model_parallel_size,
    )


def _axes(**sizes: int) -> dict[str, Axis]:
    axes, stride = {}, 1
    for name, size in sizes.items():
        axes[name] = Axis(size, stride)
        stride *= size
    return axes


def groups(axes: dict[str, Axis], *names: str) -> list[list[int]]:
    """All groups of ranks that differ only along `names`, in megatron-core's order."""
    inside = _offsets([axis for name, axis in axes.items() if name in names])
    starts = _offsets([axis for name, axis in axes.items() if name not in names])
    return [[start + offset for offset in inside] for start in starts]


def _offsets(axes: list[Axis]) -> list[int]:
    """Ranks spanned by axes, the first of them changing fastest."""
    offsets = [0]
    for axis in axes:
        offsets = [step * axis.stride + o for step in range(axis.size) for o in offsets]
    return offsets


def process_groups(config: Config) -> dict[str, list[list[int]]]:
    """Every kind of group with its ranks: `tp`, `cp`, `dp`, `pp`, `dp-cp` (which reduces the
    dense gradients), `etp`, `ep` and `edp` (which reduces those of the experts)."""
    dense, expert = dense_axes(config), expert_axes(config)
    return {
        **{name: groups(dense, name) for name in ("tp", "cp", "dp", "pp")},
        "dp-cp": groups(dense, "dp", "cp"),
        **{name: groups(expert, name) for name in ("etp", "ep", "edp")},
    }
