"""Steps of one model through either engine, in the processes that there are, and what each left."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gloo
import torch
import torch.distributed as dist
from checkpoint_runs import MODEL
from torch.distributed import checkpoint as torch_checkpoint
from trained_model import Trained, build, micro_batch

from configs.compose import load
from configs.violation import ConfigError
from pangu.engines.megatron import safe_reader

# What the engines could differ in: every kind of parameter, losses that exist in the backward
# alone, decay, a clip that always binds.
COMMON = [
    "optimizer.lr=0.001",
    "optimizer.adam_eps=1e-5",  # else AdamW makes whole steps of gradients that are noise
    "optimizer.weight_decay=0.5",
    "optimizer.clip_grad=0.2",
    "moe.aux_loss_coefficient=0.1",
    "moe.z_loss_coefficient=0.01",
]
TRAINED = ((0.9, 0.3), (0.5, 1.0))  # part of the tokens, by rank and micro-batch


@dataclass
class Left:
    """What steps gave: rows of loss, norm, loss of multi-token prediction, and whether each was
    skipped; then weights and AdamW's moments, whole, by name, and the updates counted."""

    rows: list[tuple[float, ...]]
    skipped: list[bool]
    tensors: dict[str, torch.Tensor]
    updates: int


def steps(overrides: list[str], world_size: int, poisoned: int = 1, count: int = 3) -> Left:
    """`count` steps, of which number `poisoned` meets a NaN on the last rank alone."""
    model = build([*COMMON, *overrides], world_size)
    bad = False

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if bad and dist.get_rank() == world_size - 1 else output

    module = getattr(model.chunks[0], "module", model.chunks[0])
    module.decoder.final_layernorm.register_forward_hook(poison)
    rows, skipped = [], []
    for number in range(count):
        bad = number == poisoned
        share = TRAINED[dist.get_rank()]
        seed = 100 * number + 10 * dist.get_rank()
        batches = [micro_batch(seed + i, part) for i, part in enumerate(share)]
        result = model.step(batches)
        rows.append((result.loss, result.grad_norm, result.mtp_loss or 0.0))
        skipped.append(result.skipped)
    left = Left(rows, skipped, *_state(model, module))
    gloo.drop_groups()
    return left


def _state(model: Trained, module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    from pangu.engines import state_parts

    parts = model.engine.state_parts()
    names = {parameter: name for name, parameter in module.named_parameters()}
    held = {}
    with model.engine.whole_weights():
        for part in parts:
            name = names[part.parameter]
            held[name] = part.parameter.detach().clone()
            for kind in (state_parts.MAIN, *state_parts.MOMENTS):
                held[f"{kind} {name}"] = part.whole(kind).clone()
    biases = {n: b.clone() for n, b in module.named_buffers() if n.endswith("expert_bias")}
    return held | biases, state_parts.optimizer_step(parts)


def all_steps(layouts: dict[str, list[str]], world_size: int) -> dict[str, Left]:
    """`steps` of every layout, by name."""
    return {name: steps(overrides, world_size) for name, overrides in layouts.items()}


def through(overrides: list[str], source: Path, target: Path) -> None:
    """A checkpoint read into an engine's optimizer, and written again from there."""
    from pangu.engines.megatron import process_groups
    from pangu.training.resilience import StopSignal
    from pangu.training.run import build_trainer

    warnings.filterwarnings("ignore")
    here = [f"launch.processes={dist.get_world_size()}", f"run_dir={target}"]
    config = load([*MODEL, *here, f"checkpoint.resume={source}", *overrides])
    process_groups.initialize(config)
    trainer = build_trainer(config, StopSignal())
    trainer.begin()
    trainer.save()
    assert trainer.saver.finish().error is None
    dist.barrier()
    gloo.drop_groups()


def refusal(more: str) -> str:
    """What is said of `engine.config` before a model is built."""
    from pangu.engines.deepspeed import library
    from pangu.engines.deepspeed.groups import DataParallelGroups
    from pangu.engines.megatron import process_groups

    config = load([*MODEL, "launch.processes=2", "engine=deepspeed", f"engine.config={more}"])
    process_groups.initialize(config)
    library.load()
    try:
        library.settings(config, 1, DataParallelGroups)
    except ConfigError as error:
        return str(error)
    finally:
        gloo.drop_groups()
    return ""


class Asked(dict[str, Any]):
    """A mapping that notes which keys it is asked for, in it or not."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def asked_for() -> dict[str, set[str]]:
    """By section, and "" for the whole, the names that DeepSpeed looks for in its JSON; "removed"
    those that it looks for in order to say that it has them no more."""
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from configs.deepspeed_keys import KEYS
    from pangu.engines.deepspeed import library

    library.load()
    fields = DeepSpeedZeroConfig.model_fields.items()
    names = {"zero_optimization": {n for f, info in fields for n in (f, info.alias) if n}}
    sections = {name: Asked({}) for name, inner in KEYS.items() if inner and name not in names}
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    whole = Asked({**sizes, **sections})
    config.DeepSpeedConfig(whole)
    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    names |= {name: section.names for name, section in sections.items()}
    return {**names, "": whole.names - removed, "removed": removed}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, moments too."""
    reader = safe_reader.SafeReader(folder)
    held = {}
    for name, shape in safe_reader.shapes(reader.read_metadata()).items():
        dtype = reader.read_metadata().state_dict_metadata[name].properties.dtype
        held[name] = torch.empty(shape, dtype=dtype)
    torch_checkpoint.load(held, storage_reader=reader, no_dist=True)
    return held


def farthest(found: Left, expected: Left, rank: int = 0, ranks: int = 1) -> dict[str, float]:
    """The largest differences of rows, relative, and of each kind of tensor, relative to the whole
    tensor's norm. `rank` of `ranks` has that part of the experts alone."""
    worst = {"rows": 0.0}
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a == a or b == b:
                worst["rows"] = max(worst["rows"], abs(a - b) / abs(b))
    for name, tensor in expected.tensors.items():
        if ".experts." in name:
            tensor = tensor.chunk(ranks)[rank % ranks]
        kind = name.partition(" ")[0] if " " in name else "weight"
        error = (found.tensors[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        worst[kind] = max(worst.get(kind, 0.0), error.item())
    return worst
