"""Live placement of experts under a skewed router: how even devices' loads become, and steps.

    python benchmarks/placement.py

Four processes with expert parallelism 4 train a small top-k model whose experts are chosen by
Zipf's law (exponent 1, as many different choices a token as top-k has, drawn without replacement),
whatever the router thinks; experts that are chosen alike often do not lie together. Two layers, 32
experts, top-4. The coefficient of variation of device load is that of single steps, the mean of the
layers; steps are wall seconds of one run, medians of before and after the first move. A table with
the date goes to `benchmarks/results/`.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, PERIOD, EXPERTS, TOP_K = 40, 20, 32, 4
PROCESSES = 4
RUN = [
    *["model.num_layers=2", "model.num_dense_layers=0", "model.hidden_size=256"],
    *[f"model.num_experts={EXPERTS}", "model.moe_ffn_hidden_size=256", "model.vocab_size=512"],
    *["moe=top_k", f"moe.top_k={TOP_K}", "moe.dispatcher=alltoall", "moe.placement=dynamic"],
    *[f"moe.placement_period={PERIOD}", f"parallel.expert_model_parallel_size={PROCESSES}"],
    *["data=synthetic", "train.seq_length=128", "train.global_batch_size=8"],
    *[f"train.steps={STEPS}", "train.validate_every=0", "checkpoint.save_at_end=false"],
    *["backend=cpu", "backend.threads=1", f"launch.processes={PROCESSES}"],
]


def popularity(layer: int) -> Any:
    """How often a layer's experts are chosen, `[E]`."""
    import numpy as np

    return np.random.default_rng(layer).permutation(1 / np.arange(1, EXPERTS + 1))


def skew(layer: Any) -> None:
    """Let a router choose by popularity."""
    import torch

    number = layer.router.layer_number
    logarithm_E = torch.from_numpy(popularity(number)).log().float()
    draw = torch.Generator().manual_seed(number + 100 * int(os.environ["RANK"]))

    def choose(logits_TE: torch.Tensor, bias: torch.Tensor | None) -> Any:
        noise = torch.rand(logits_TE.shape, generator=draw).clamp(min=1e-9)
        keys = logarithm_E - (-noise.log()).log()  # the highest are draws without replacement
        chosen = torch.zeros_like(logits_TE, dtype=torch.bool)
        chosen.scatter_(1, keys.topk(TOP_K, dim=1).indices, True)
        weights = torch.where(chosen, logits_TE, -torch.inf).softmax(dim=1)
        return weights, chosen

    layer.router.functions = choose


def train(run_dir: str) -> None:
    """One process of the run."""
    import torch.distributed as dist

    from configs.compose import load
    from pangu import backends
    from pangu.engines.megatron.fitting import select_backend

    config = load([*RUN, f"run_dir={run_dir}"])
    select_backend("cpu")
    from pangu.engines.megatron import process_groups
    from pangu.moe.layer import ExpertLayer
    from pangu.training.resilience import StopSignal
    from pangu.training.run import build_trainer

    dist.init_process_group(backends.current().collective_library)
    process_groups.initialize(config)
    trainer = build_trainer(config, StopSignal())
    for chunk in trainer.engine.chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertLayer):
                skew(module)
    trainer.train()
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    before, after = rows[2:PERIOD], rows[PERIOD + 2 :]
    cv = [statistics.mean(r["device_load_cv"] for r in part) for part in (before, after)]
    seconds = [statistics.median(r["step_seconds"] for r in part) for part in (before, after)]
    moved = sum(r["experts_moved"] for r in rows)
    return "\n".join(
        [
            "| | before | after | |",
            "|---|---|---|---|",
            f"| coefficient of variation of device load | {cv[0]:.3f} | {cv[1]:.3f} | "
            f"{100 * (cv[1] / cv[0] - 1):+.0f} % |",
            f"| step, seconds | {seconds[0]:.2f} | {seconds[1]:.2f} | "
            f"{100 * (seconds[1] / seconds[0] - 1):+.0f} % |",
            "",
            f"{moved} experts moved after step {PERIOD}; that step took "
            f"{rows[PERIOD - 1]['step_seconds']:.2f} s, the exchange included.",
        ]
    )


def main() -> int:
    if len(sys.argv) > 1:
        train(sys.argv[1])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={PROCESSES}", __file__, folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        load_before = os.getloadavg()[0]
        subprocess.run(command, env=environment, check=True)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    text = table([json.loads(line) for line in lines])
    today = datetime.date.today()
    head = f"# Live placement under a Zipf-skewed router\n\n{today}, {os.cpu_count()} cores, "
    head += f"load {load_before:.0f} when it began. `python benchmarks/placement.py`.\n\n"
    (ROOT / f"benchmarks/results/{today}-placement.md").write_text(head + text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
