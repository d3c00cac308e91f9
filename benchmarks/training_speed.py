"""Training speed of a small Qwen3-MoE on one CPU thread, beside transformers, in one run.

Tokens per CPU-second of forward, backward and AdamW: 4 layers, width 256, 32 experts of width 128,
top-4, vocabulary 4096, 4 x 256 tokens, float32, the same weights' shapes. Then two processes with
expert parallelism 2 against one, in tokens per second, for the model's own top-k router and for
MoGE: only meaningful with two idle cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHAPE = {"layers": 4, "width": 256, "experts": 32, "top_k": 4, "ffn": 128, "vocab": 4096}
BATCH, SEQ = 4, 256
OURS = [
    "model=qwen3_30b_a3b",
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.kv_channels=32",
    "model.vocab_size=4096",
    "model.num_experts=32",
    "model.moe_ffn_hidden_size=128",
    "moe.top_k=4",
    "data=synthetic",
    "backend=cpu",
    "optimizer.warmup_steps=0",
    f"train.micro_batch_size={BATCH}",
    f"train.seq_length={SEQ}",
]
MOGE = ("moe=moge", "moe.num_expert_groups=4")
ROUNDS, STEPS = 9, 4
CONTESTANTS = ("pangu", "transformers grouped_mm", "transformers eager")


def transformers_step(implementation: str) -> Callable[[], None]:
    """A training step of transformers' Qwen3-MoE with one way to compute its experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=SHAPE["vocab"],
            hidden_size=SHAPE["width"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=SHAPE["experts"],
            num_experts_per_tok=SHAPE["top_k"],
            moe_intermediate_size=SHAPE["ffn"],
            norm_topk_prob=True,
            output_router_logits=True,
            experts_implementation=implementation,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, SHAPE["vocab"], (BATCH, SEQ))

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step() -> Callable[[], None]:
    """The same through `pangu.training`."""
    from configs.compose import load
    from pangu.data.datasets import batches, build_datasets
    from pangu.engines.contract import StepShape
    from pangu.engines.megatron.engine import MegatronEngine

    config = load([*OURS, f"train.global_batch_size={BATCH}"])
    count = (ROUNDS + 2) * STEPS
    data = build_datasets(config, train_samples=count * BATCH, validation_samples=0, seq_length=SEQ)
    engine = MegatronEngine.build(config)
    iterator = batches(
        data.train,
        config,
        data_parallel_rank=0,
        data_parallel_size=1,
        consumed_sequences=0,
        micro_batch_size=BATCH,
    )
    shape = StepShape(1, BATCH, SEQ)
    return lambda: void(engine.train_step(iterator, shape)())


def void(_: object) -> None:
    """Drop a result."""


def work(name: str) -> None:
    """One contestant, in a process of its own as its users have it: for every line on stdin,
    STEPS steps, and the CPU seconds that they took on stdout."""
    torch.set_num_threads(1)
    if name == "pangu":
        from configs.compose import load
        from pangu.engines.megatron import process_groups
        from pangu.engines.megatron.fitting import select_backend

        select_backend("cpu")
        process_groups.join_alone(load([*OURS, f"train.global_batch_size={BATCH}"]))
        step = our_step()
    else:
        step = transformers_step(name.removeprefix("transformers "))
    for _ in range(STEPS):
        step()
    for _ in sys.stdin:
        started = time.process_time()
        for _ in range(STEPS):
            step()
        print(time.process_time() - started, flush=True)


def one_thread() -> dict[str, list[float]]:
    """Tokens per CPU-second of each contestant, one figure a round. They take turns, so that all
    meet the same machine."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in CONTESTANTS
    }
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(ROUNDS + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                sys.exit(f"{name} ended with its message above")
            seconds = float(answer)
            if turn:  # the first turn warms up
                rates[name].append(STEPS * BATCH * SEQ / seconds)
    for worker in workers.values():
        worker.communicate()
    return rates


def start(folder: str, count: int, router: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A whole run of `pangu.train` on `count` processes, expert parallel over all of them."""
    overrides = [
        *OURS,
        *router,
        f"train.global_batch_size={2 * BATCH}",
        "train.steps=16",
        "train.validate_every=0",
        f"launch.processes={count}",
        "backend.threads=1",
        f"parallel.expert_model_parallel_size={count}",
        "parallel.zero_stage=0",
        "checkpoint.save_at_end=false",
        f"run_dir={folder}",
    ]
    command = [sys.executable, "-W", "ignore", "-m", "pangu.train", *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def tokens_per_second(*counts: int, router: tuple[str, ...] = ()) -> float:
    """Of runs on so many processes each that go on at the same time, added up; medians over
    steps."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"{folder}/{number}" for number in range(len(counts))]
        started = [start(path, n, router) for path, n in zip(folders, counts, strict=True)]
        if any(process.wait() for process in started):
            sys.exit("a run failed")
        total = 0.0
        for path in folders:
            rows = [json.loads(row) for row in (Path(path) / "metrics.jsonl").open()]
            steps = [r["tokens"] / r["step_seconds"] for r in rows if "loss" in r]
            total += statistics.median(steps[3:])
        return total


def main() -> None:
    """Print both comparisons as ratios."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
        return
    rates = one_thread()
    print("tokens per CPU-second, one thread: median (lowest to highest round)")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["pangu"], values, strict=True))
        print(
            f"  {name:26} {statistics.median(values):6.0f} ({min(values):.0f} to {max(values):.0f})"
            f"   pangu is {ratio:.2f} x"
        )
    one, moge = tokens_per_second(1), tokens_per_second(1, router=MOGE)
    results = {
        "one process": (one, one),
        "two, expert parallel 2": (tokens_per_second(2), one),
        "one process, MoGE": (moge, moge),
        "two, MoGE, parallel 2": (tokens_per_second(2, router=MOGE), moge),
        # What the cores give when both are busy: no layout can be expected to beat this by much.
        "two that share nothing": (tokens_per_second(1, 1), one),
    }
    print("tokens per second, whole run")
    for name, (rate, alone) in results.items():
        print(f"  {name:26} {rate:6.0f}   {rate / alone:.2f} x")


if __name__ == "__main__":
    main()
