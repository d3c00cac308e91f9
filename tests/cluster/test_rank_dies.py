"""A rank that dies takes the ranks of all nodes with it, and is the last that both nodes tell."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from drills.kills import MODEL

from cluster import Cluster
from cluster.privileges import needs_cluster
from cluster.test_cluster import environ

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end, needs_cluster]
HERE = Path(__file__).parent


def test_a_rank_that_dies_ends_the_job_with_its_traceback_last_on_every_node(tmp_path: Path):
    settings = [setting for setting in MODEL if not setting.startswith("launch.")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
    command += [str(HERE / "rank_dies.py"), *settings, f"run_dir={tmp_path}"]
    with Cluster(2) as cluster:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [
            node.start(command, env=environ(cluster, node), **pipes) for node in cluster.nodes
        ]
        while not (left := list((tmp_path / "logs").glob("rank_1.failure"))):
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
        died = left[0].stat().st_mtime
        said = [process.communicate(timeout=120)[0] for process in started]
        # With half the time in hand that a job may take: 30 s on a machine of its own.
        assert time.time() - died < 60
    assert all(process.returncode == 1 for process in started), "torchrun's own"
    for node, output in enumerate(said):
        account = output.rpartition("Root Cause")[2]
        assert account.count("ZeroDivisionError: a fault of rank 1 alone") == 1, output
        assert f"exitcode  : {(4, 1)[node]}" in account
    assert "rank 0 waited in vain for another after step 3: " in said[0]
    assert "Did not come: rank 1" in said[0]
