"""Short runs of one tiny model, several in the same processes, with and without checkpoints."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo import drop_groups
from layouts import MODEL as TINY

from configs.compose import load

MODEL = [
    *TINY,
    "moe.router_scale=true",
    "train.seq_length=16",
    "train.validate_every=0",
    "optimizer.schedule=constant",
    "backend.threads=1",
]
Steps = dict[int, tuple[float, float]]


def train(run_dir: Path, overrides: list[str]) -> tuple[Steps, dict[str, torch.Tensor]]:
    """Train in the processes that there are. Returns (loss, gradient norm) by step, and this
    rank's weights at the end."""
    from pangu.engines.megatron import process_groups
    from pangu.report.run_files import METRICS, read_metrics
    from pangu.training.resilience import StopSignal
    from pangu.training.run import build_trainer

    warnings.filterwarnings("ignore")
    processes = f"launch.processes={dist.get_world_size()}"
    config = load([*MODEL, processes, f"run_dir={run_dir}", *overrides])
    process_groups.initialize(config)
    try:
        trainer = build_trainer(config, StopSignal())
        assert trainer.train() == 0
    finally:
        dist.barrier()
        drop_groups()
    rows: list[dict[str, Any]] = [r for r in read_metrics(run_dir / METRICS) if "loss" in r]
    weights = {
        f"{i}.{name}": tensor.detach().clone()
        for i, chunk in enumerate(trainer.engine.chunks)
        for name, tensor in chunk.named_parameters()
    }
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}, weights


def copy(source: Path, target: Path) -> Path:
    """A run folder to try something on."""
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()
    return target
