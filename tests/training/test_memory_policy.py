"""`memory=auto` holds its limit: the same choice in a run's first lines and in a forecast, and in a
process torch's allocator stays below it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gloo import run
from layouts import MODEL, steps
from typer.testing import CliRunner

from configs.check import load_checked
from configs.compose import read_file
from configs.schema import MemoryConfig
from simulator.__main__ import application
from simulator.memory_policy import Policy, settle

GIB = 2**30
# Activations are most of what it takes: rows of many tokens.
WIDE = [
    *MODEL,
    "model.num_layers=8",
    "model.hidden_size=128",
    "model.kv_channels=32",
    "model.moe_ffn_hidden_size=128",
    "model.shared_expert_ffn_hidden_size=128",
    "train.seq_length=256",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "backend.precision=fp32",
]
MACHINE = ["hardware=h100", "hardware.backend=cpu", "hardware.host_link_gbps=1"]


def auto(limit: float, *more: str) -> list[str]:
    return [*WIDE, *MACHINE, "memory=auto", f"memory.limit_gib={limit:.4f}", *more]


def policy(limit: float, *more: str) -> tuple[MemoryConfig, Policy]:
    config, found = settle(load_checked(auto(limit, *more), purpose="plan"))
    assert found is not None
    return config.memory, found


def as_overrides(memory: MemoryConfig) -> list[str]:
    return [
        *WIDE,
        f"memory={memory.recompute_granularity}",
        f"memory.recompute_modules=[{','.join(memory.recompute_modules)}]",
        f"memory.swap=[{','.join(memory.swap)}]",
    ]


def peak(overrides: list[str]) -> float:
    """The most that torch's allocator holds in GiB, from before the model is built to the end of
    the second step."""
    import torch
    from torch._C._profiler import _EventType

    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        steps(overrides, 1, 2)
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return most / GIB


def held_limits() -> list[tuple[float, Policy, float]]:
    """Limit, choice and measured peak, on a machine calibrated by the run that keeps everything:
    what is held beyond the count is inside one layer or before the model, whatever is kept."""
    beyond = peak(WIDE) - policy(1000.0)[1].peak_gib
    machine = f"hardware.process_base_bytes={beyond * GIB}"
    whole = policy(1000.0, machine)[1]
    assert not whole.choices
    found = []
    for part in (0.9, 0.7):
        limit = whole.peak_gib * part
        memory, chosen = policy(limit, machine)
        found.append((limit, chosen, peak(as_overrides(memory))))
    return found


@pytest.mark.distributed
def test_a_limit_is_held_by_the_allocator():
    for limit, chosen, measured in run(1, held_limits)[0]:
        assert chosen.choices
        assert measured <= limit
        assert measured == pytest.approx(chosen.peak_gib, rel=0.1)
        released = sum(each.released_gib for each in chosen.choices)
        assert chosen.kept_gib - released == pytest.approx(chosen.peak_gib)


@pytest.mark.end_to_end
def test_a_run_says_what_the_forecast_says_and_trains_with_it(tmp_path: Path):
    limit = policy(1000.0)[1].peak_gib * 0.8
    memory, found = policy(limit)
    folder = f"run_dir={tmp_path / 'run'}"
    more = ["train.steps=1", "train.validate_every=0", "checkpoint.save_at_end=false", folder]
    arguments = auto(limit, *more)
    trained = subprocess.Popen(
        [sys.executable, "-m", "pangu.train", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert trained.stderr is not None
    said = trained.stderr.readline()  # by the process that stays below the limit
    own = Path(f"/proc/{trained.pid}/environ").read_bytes()
    assert b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0\0" in own
    said += trained.stderr.read()
    assert trained.wait() == 0, said
    assert said.startswith(found.table())
    assert read_file(tmp_path / "run" / "config.yaml", "run_dir").memory == memory


def test_forecasts_print_the_choice_and_hopeless_limits_are_refused(capsys):
    from pangu.train import main as train

    limit = policy(1000.0)[1].peak_gib * 0.8
    memory, found = policy(limit)
    assert policy(limit) == (memory, found)
    command = ["predict", *auto(limit)]
    said = CliRunner().invoke(application(["predict"]), command).output
    assert said.startswith(found.table())
    said = CliRunner().invoke(application(["predict"]), [*command, "--json"]).output
    assert json.loads(said)["memory_policy"] == found.to_json()
    assert train(auto(0.001)) == 2
    least = re.search(r"memory.limit_gib=([\d.]+)", capsys.readouterr().err)
    assert least is not None
    assert policy(float(least[1]))[1].peak_gib < float(least[1])
    assert train([*auto(1), "hardware.backend=npu"]) == 2
    assert "npu" in capsys.readouterr().err
