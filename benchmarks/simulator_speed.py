"""Speed of the planner: `python benchmarks/simulator_speed.py`.

Prints the seconds of `predict` from the command line, and of a search of 1,000,000 full
evaluations (time, communication and memory) of Pangu Ultra MoE on 6,144 devices over two
processes, with the largest resident memory of each.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np

from configs.compose import load
from simulator import candidates, search

PLAN = [
    "model=pangu_ultra_moe",
    "hardware=ascend_910b_280t",
    "devices=6144",
    "train.seq_length=8192",
    "train.global_batch_size=6144",
]
LAYOUT = ["parallel=pangu_ultra", "train.micro_batch_size=2"]
EVALUATIONS = 1_000_000


def main() -> None:
    """Run and print."""
    command = [sys.executable, "-m", "simulator", "predict", *PLAN, *LAYOUT, "--json"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    print(f"predict: {min(times):.2f} s, start-up included (best of {len(times)})")

    config = load(PLAN)
    start = time.perf_counter()
    structures, _ = candidates.enumerate_layouts(config, frozenset(), everything=False)
    policies = candidates.recompute_policies(config, frozenset())
    print(f"enumerated {len(structures.tp):,} layouts in {time.perf_counter() - start:.2f} s")
    # The first million in a random order of layouts: as many deep pipelines as shallow ones.
    count = EVALUATIONS // len(policies)
    chosen = np.sort(np.random.default_rng(0).permutation(len(structures.tp))[:count])
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = usage.ru_utime + usage.ru_stime
    start = time.perf_counter()
    step, *_ = search._evaluate_all(config, structures.take(chosen), policies, 2, None)
    seconds = time.perf_counter() - start
    print(f"{len(step):,} evaluations: {seconds:.1f} s, {len(step) / seconds:,.0f}/s")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"of which on a core: {usage.ru_utime + usage.ru_stime - before:.1f} s")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"memory: {own:.2f} GiB, and {child:.2f} GiB in the largest child")


if __name__ == "__main__":
    main()
