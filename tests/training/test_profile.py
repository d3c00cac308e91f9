"""Traces of steps: what they hold, and how the hidden share is counted."""

import json
from itertools import pairwise

import gloo
import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import MODEL

from configs import check
from configs.compose import load
from pangu.backends.timeline import BETWEEN, COMPUTE, INSIDE, LANES, Span, timeline
from pangu.training.profile import TRACE, hidden, trace


def of_two(folder):
    """The lines of a run of six steps whose last two are in a trace."""
    from pangu.engines.megatron import process_groups
    from pangu.training import profile
    from pangu.training.resilience import StopSignal
    from pangu.training.run import build_trainer

    lines = []
    profile.say = lines.append
    overrides = ["launch.processes=2", "parallel.expert_model_parallel_size=2", f"run_dir={folder}"]
    overrides += ["train.steps=3", "profile.steps=[2,3]", "checkpoint.save_at_end=false"]
    overrides += ["train.validate_every=0", "moe.dispatcher=alltoall", "train.seq_length=128"]
    overrides += ["memory.swap=[core_attn,moe]"]
    config = load([*MODEL, *overrides])
    process_groups.initialize(config)
    build_trainer(config, StopSignal()).train()
    gloo.drop_groups()
    return lines, timeline.recording, len(timeline.spans)


def beside():
    """Of an asynchronous sum and of one that is waited for, beside products: the spans."""
    a, large = torch.ones(600, 600), torch.ones(4_000_000)
    dist.all_reduce(torch.ones(4))
    with timeline.step(1):
        work = dist.all_reduce(large, async_op=True)
        for _ in range(40):
            a @ a
        work.wait()
        dist.all_reduce(large)
    return timeline.spans


@pytest.mark.distributed
def test_a_run_leaves_a_trace_of_all_ranks(tmp_path):
    (lines, *_), (_, recording, left) = gloo.run(2, of_two, tmp_path)
    assert not recording
    assert left == 0
    assert str(tmp_path / TRACE) in lines[0]
    assert any("communication of experts" in line and "0% hidden" in line for line in lines)
    assert any(line.startswith("swap: ") for line in lines)
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(rank, n): lane for rank in (0, 1) for n, lane in enumerate(LANES)}
    for rank in (0, 1):
        tracks = {n: [e for e in slices if (e["pid"], e["tid"]) == (rank, n)] for n in range(4)}
        assert {e["name"] for e in tracks[0]} == {"backward", "forward, optimizer"}
        assert "all_to_all_single" in {e["name"] for e in tracks[1]}
        assert not tracks[2]
        assert {e["name"] for e in tracks[3]} == {"out", "back"}
        assert all(e["dur"] >= 0 for e in slices)
        # Exchanges that are waited for leave no time in which this rank does both.
        sent = [e for e in tracks[1] if e["name"] == "all_to_all_single"]
        ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in [*tracks[0], *sent])
        assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(ends))


@pytest.mark.distributed
def test_an_asynchronous_collective_is_recorded_to_its_end():
    for spans in gloo.run(2, beside):
        sums = [span for span in spans if span.lane == BETWEEN]  # a rank on each node
        assert len(sums) == 2
        assert all(span.end > span.start for span in sums)
        computing = [span for span in spans if span.lane == COMPUTE]
        assert computing[0].start < sums[0].start < computing[0].end
        share = hidden([spans])["communication"]
        assert 0 < share.hidden < share.lasting


def test_the_hidden_share_is_counted_like_on_a_grid():
    rng = np.random.default_rng(0)
    ranks, lasting, both, experts = [], 0, 0, 0
    for _ in range(3):
        spans, grid = [], {}
        for lane in (COMPUTE, INSIDE, BETWEEN):
            for group in ("EXPERT_MODEL_PARALLEL_GROUP", "EXPERT_DATA_PARALLEL_GROUP"):
                for start in rng.integers(0, 900, 8):
                    end = start + int(rng.integers(0, 60))
                    spans.append(Span(lane, "x", int(start), end, group))
                    grid.setdefault(lane, np.zeros(1000, bool))[start:end] = True
                    if lane != COMPUTE and "MODEL" in group:
                        grid.setdefault("experts", np.zeros(1000, bool))[start:end] = True
        talk = grid[INSIDE] | grid[BETWEEN]
        lasting += talk.sum()
        both += (talk & grid[COMPUTE]).sum()
        experts += grid["experts"].sum()
        ranks.append(spans)
    found = hidden(ranks)
    assert found["communication"].lasting == pytest.approx(lasting / 3e9)
    assert found["communication"].hidden == pytest.approx(both / 3e9)
    assert found["communication of experts"].lasting == pytest.approx(experts / 3e9)
    assert len(trace(ranks)["traceEvents"]) == 3 * (48 + 1 + 2 * len(LANES))


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["train.steps=4", "profile.steps=[3,5]"], "profile.steps=[3]"),
        (["backend=cuda", "profile.steps=[3]"], "backend.name=cpu"),
    ],
)
def test_what_cannot_be_traced_is_refused(overrides, hint):
    _, found = check.examine(overrides, alone=True)
    assert any(hint in str(violation) and "profile.steps" in str(violation) for violation in found)
