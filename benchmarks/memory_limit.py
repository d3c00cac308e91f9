"""`memory=auto` beside what a whole process takes: the peak of its resident set under some limits,
and the plan's. Processes of a CPU, float32, several with as many parts of the experts; six steps of
each run.

    python benchmarks/memory_limit.py [PROCESSES]

What a process holds beyond the count is in the hardware file as `pangu.calibrate` has it: what a
model without width takes, and the rest as a part of what comes and goes where everything is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.check import load_checked
from configs.violation import ConfigError
from pangu.calibration.framework import beyond_counted
from simulator.memory_policy import Policy, settle

GIB = 2**30
RUN = ["data=synthetic", "backend=cpu", "backend.precision=fp32", "train.steps=6"]
RUN += ["train.validate_every=0", "checkpoint.save_at_end=false"]
NARROW = [*RUN, "model.num_layers=2", "model.hidden_size=32", "model.kv_channels=8"]
NARROW += ["train.seq_length=32", "train.micro_batch_size=1", "train.global_batch_size=1"]
WIDE = [*RUN, "model.num_layers=8", "model.hidden_size=256", "model.kv_channels=64"]
WIDE += ["model.moe_ffn_hidden_size=128", "model.shared_expert_ffn_hidden_size=256"]
WIDE += ["train.seq_length=512", "train.micro_batch_size=4", "train.global_batch_size=4"]
MACHINE = ["hardware=a100", "hardware.backend=cpu", "hardware.host_link_gbps=1"]
PROCESSES = int(sys.argv[1]) if len(sys.argv) > 1 else 1
if PROCESSES > 1:
    MORE = [f"parallel.expert_model_parallel_size={PROCESSES}", f"launch.processes={PROCESSES}"]
    NARROW += [*MORE, f"train.global_batch_size={PROCESSES}"]
    WIDE += [*MORE, f"train.global_batch_size={4 * PROCESSES}"]
PARTS = (0.95, 0.9, 0.86, 0.7)  # limits, of what keeping everything takes


def resident(overrides: list[str]) -> float:
    """Peak of the resident set of a run's process, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pangu.train", *overrides, f"run_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        rows = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        return json.loads(rows[-1])["memory_gib"]


def planned(limit: float, machine: list[str]) -> Policy:
    """What is kept, recomputed and swapped under a limit in GiB."""
    overrides = [*WIDE, *machine, "memory=auto", f"memory.limit_gib={limit}"]
    policy = settle(load_checked(overrides, purpose="plan"))[1]
    assert policy is not None
    return policy


def main() -> None:
    bare = [*MACHINE, "memory=auto", "memory.limit_gib=1000"]
    counted = settle(load_checked([*NARROW, *bare], purpose="plan"))[1]
    assert counted is not None
    base = (resident(NARROW) - counted.peak_gib) * GIB
    everything = resident(WIDE)
    overhead = beyond_counted([*WIDE, "hardware.backend=cpu"], everything * GIB - base)
    machine = [*MACHINE, f"hardware.process_base_bytes={base}"]
    machine.append(f"hardware.memory_overhead={overhead}")
    print(f"Beyond the count: {base / GIB:.3f} GiB, and {overhead:.3f} of what comes and goes.\n")
    print("| limit GiB | planned | resident | of plan | of limit | not kept |")
    print("|---|---|---|---|---|---|")
    plan = planned(1000.0, machine).peak_gib
    print(f"| none | {plan:.3f} | {everything:.3f} | | | |", flush=True)
    for share in PARTS:
        print(f"| {row(round(everything * share, 3), machine)} |", flush=True)


def row(limit: float, machine: list[str]) -> str:
    """A run under a limit in GiB, beside its plan."""
    try:
        plan = planned(limit, machine)
    except ConfigError as error:
        return f"{limit:.3f} | refused, {error.violations[0].suggestion} | | | | "
    found = resident([*WIDE, *machine, "memory=auto", f"memory.limit_gib={limit}"])
    shares = f"{found / plan.peak_gib - 1:+.1%} | {found / limit - 1:+.1%}"
    modules = ", ".join(f"{each.module} {each.way}" for each in plan.choices)
    return f"{limit:.3f} | {plan.peak_gib:.3f} | {found:.3f} | {shares} | {modules}"


if __name__ == "__main__":
    main()
