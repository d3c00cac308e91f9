"""`python -m pangu.calibrate --machine` on two nodes finds the rate of the link between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.network import Cluster
from cluster.privileges import needs_cluster
from simulator.hardware import read_hardware

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@needs_cluster
def test_two_nodes_find_the_rate_of_their_link(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "pangu.calibrate", "--machine", "h100", "--quick", "--out", str(out)]
    with Cluster(2, "200mbit") as cluster:
        command += ["backend=cpu", "backend.threads=1"]
        threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        assert cluster.run(command, threads) == [0, 0]
    known, found = read_hardware("h100"), read_hardware(out)
    assert (found.name, found.devices_per_node) == ("cluster", 2)
    assert found.matmul == known.matmul
    # Both ranks of a node send at once, and the card is theirs together: 12.5 MB/s for each.
    inside, link = found.links
    assert (inside.name, inside.devices) == (known.links[0].name, 2)
    reached = {kind: link.bandwidth * part / 12.5e6 for kind, part in link.efficiency.items()}
    for kind in ("all_gather", "all_to_all", "send_recv"):
        assert 0.4 < reached[kind] < 1.6, reached


def test_one_node_has_nothing_between(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pangu.calibrate", "--machine", "h100"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "cluster.yaml"), "backend=cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("--machine=h100: it takes two nodes")
    assert "torchrun --nnodes=2" in done.stderr
