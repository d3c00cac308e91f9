"""The cluster on one machine: links that count, limit and break; nodes that die; nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, Node
from cluster.network import (
    ETC,
    NETNS,
    PREFIX,
    ClusterError,
    remove_leftovers,
    started_at,
    wait_until,
)
from cluster.privileges import needs_cluster

pytestmark = [pytest.mark.distributed, needs_cluster]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
MIB = 1 << 20


def environ(cluster: Cluster, node: Node) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**cluster.environment(node), **more}


@pytest.fixture
def pair() -> Iterator[Cluster]:
    with Cluster(2) as cluster:
        yield cluster


def test_collectives_between_nodes_go_over_the_link_and_no_others(tmp_path: Path) -> None:
    """Two nodes of two ranks; every rank gives 4 MiB. Formulas: bytes that leave a node."""
    megabit = 200
    with Cluster(2, f"{megabit}mbit") as cluster:
        command = ["torchrun", "--nproc-per-node=2", str(HERE / "rank_traffic.py"), str(tmp_path)]
        started = [node.start(command, env=environ(cluster, node)) for node in cluster.nodes]
        assert [process.wait(timeout=180) for process in started] == [0, 0]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    expected = {
        "all-reduce inside": 0,
        "all-to-all inside": 0,
        "all-to-all across": 2 * 4 * MIB / 2,  # two ranks, each half of its own
        "all-to-all of all": 2 * 4 * MIB / 2,  # each a quarter to either rank beyond the link
        "all-gather across": 2 * 4 * MIB,
    }
    control = 20_000  # bytes of the barriers around
    for name, volume in expected.items():
        sent, started, ended = zip(*(found[name] for found in ranks), strict=True)
        assert sent == pytest.approx([volume] * 4, rel=0.05, abs=control), name
        # A link is never faster than its rate, but for its first burst.
        assert max(ended) - min(started) >= 0.9 * (volume - MIB) * 8 / (megabit * 1e6), name


RECEIVE = """
import socket
listener = socket.create_server(("", 5000))
print("listening", flush=True)
taken, _ = listener.accept()
while taken.recv(1 << 16): pass
print("all", flush=True)
"""
SEND = """
import socket, sys
wire = socket.create_connection(("node0", 5000))
wire.sendall(bytes(int(sys.argv[1])))
"""


def transfer(cluster: Cluster, size: int) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Node 1 sends node 0 `size` bytes: (who receives, who sends)."""
    first, second = cluster.nodes
    receiver = first.start([sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "listening\n"
    return receiver, second.start([sys.executable, "-c", SEND, str(size)], text=True)


def test_a_cut_link_carries_nothing_and_what_waits_goes_on_when_it_is_mended(
    pair: Cluster,
) -> None:
    first, second = pair.nodes
    second.limit("20mbit")
    receiver, sender = transfer(pair, 4 * MIB)
    wait_until(lambda: first.link().received > MIB, 30, "a megabyte has come")
    second.cut()
    time.sleep(0.1)  # for what has left the switch
    before = first.link()
    time.sleep(0.5)
    assert (first.link() - before).received == 0
    assert receiver.poll() is None
    second.limit("1gbit")
    second.mend()
    assert sender.wait(60) == 0
    assert receiver.wait(60) == 0
    assert first.link().received == pytest.approx(4 * MIB, rel=0.05)


def test_a_changed_rate_holds(pair: Cluster) -> None:
    seconds = {}
    for megabit in (None, 20):
        pair.nodes[1].limit(f"{megabit}mbit" if megabit else None)
        receiver, sender = transfer(pair, 2 * MIB)
        started = time.perf_counter()
        assert (sender.wait(60), receiver.wait(60)) == (0, 0)
        seconds[megabit] = time.perf_counter() - started
    assert seconds[20] >= 0.9 * (2 * MIB - MIB / 2) * 8 / 20e6
    with pytest.raises(ClusterError, match="rate"):
        pair.nodes[1].limit("quick")


def test_a_killed_node_runs_nothing_and_the_other_goes_on(pair: Cluster) -> None:
    first, second = (node.start(["sh", "-c", "sleep 100; true"]) for node in pair.nodes)
    wait_until(lambda: len(pair.nodes[1].processes()) == 2, 30, "the shell and its sleep")
    pair.nodes[1].kill()
    assert second.wait(30) == -signal.SIGKILL
    assert pair.nodes[1].processes() == []
    assert first.poll() is None
    first.kill()
    again = pair.nodes[1].start(["hostname"], stdout=subprocess.PIPE, text=True)
    assert again.communicate(timeout=30)[0] == "node1\n"


def left() -> set[str]:
    return {path.name for folder in (NETNS, ETC) for path in folder.glob(f"{PREFIX}-*")}


def test_what_a_killed_cluster_leaves_goes_when_the_next_one_starts() -> None:
    """Its processes too, even one in a session of its own whose parent is gone."""
    script = (
        "import subprocess, time\n"
        "from tests.cluster import Cluster\n"
        "with Cluster(2) as cluster:\n"
        "    cluster.nodes[1].start(['sh', '-c', 'setsid sleep 1000 & sleep 1000'])\n"
        "    while len(cluster.nodes[1].processes()) < 3: time.sleep(0.05)\n"
        "    print(cluster.nodes[1].space, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    space = owner.stdout.readline().strip()
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
    assert found
    assert remove_leftovers() == [], "a living one's are left alone"
    owner.kill()
    owner.wait(30)
    assert space in left()
    with Cluster(2) as cluster:
        names = {node.space for node in cluster.nodes} | {cluster.nodes[0].switch}
        assert space not in left()
        assert names <= left()
    assert not any(started_at(int(pid)) for pid in found.split())
    assert not names & left()


def test_an_exception_leaves_nothing() -> None:
    cluster = Cluster(2)
    started = []

    def fails() -> None:
        with cluster:
            started.append(cluster.nodes[0].start(["sleep", "1000"]))
            raise KeyError("anything")

    with pytest.raises(KeyError, match="anything"):
        fails()
    assert started[0].wait(10) == -signal.SIGKILL
    assert not {node.space for node in cluster.nodes} & left()
    with pytest.raises(ValueError, match="1 to 16"):
        Cluster(17)


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )


def test_the_command_runs_on_every_node_and_ends_with_the_bytes() -> None:
    say = 'hostname; test "$RANK$PET_NODE_RANK$NODE_RANK" = 111 && exit 7 || exit 0'
    process = command("--nodes", "3", "--rate", "200mbit", "--", "sh", "-c", say)
    output, error = process.communicate(timeout=60)
    lines = output.splitlines()
    assert (process.returncode, error) == (7, "")
    assert sorted(lines[:3]) == [f"node{rank}: node{rank}" for rank in range(3)]
    assert lines[3].split() == ["link", "rate", "bytes", "sent", "bytes", "received"]
    assert [line.split()[:2] for line in lines[4:]] == [[f"node{n}", "200mbit"] for n in range(3)]

    refused = command("--rate", "quick", "--", "true")
    output, error = refused.communicate(timeout=60)
    assert (refused.returncode, output) == (2, "")
    assert "rate" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_the_nodes_and_all_is_removed(number: signal.Signals) -> None:
    before = left()
    listen = "trap 'echo heard; exit 3' INT; echo up; while true; do sleep 0.1; done"
    process = command("--", "sh", "-c", listen)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"node0: up\n", "node1: up\n"}
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert ("node0: heard" in output) == (number == signal.SIGINT)
    assert left() == before
