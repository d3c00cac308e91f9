"""Run a command on every node of a cluster on this machine; the bytes sent per link come last."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from .network import Cluster, ClusterError, Link, obstacle

LEAVE = 30.0  # seconds for the other nodes to end by themselves once one has failed

USAGE = """
COMMAND runs once on every node, in this folder, and finds in its environment
  RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
      for pangu.train, of which every node runs one process then;
  PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT
      for torchrun, which needs no --nnodes, --node-rank, --master-addr then;
  NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
      for launch/torchrun.sh and launch/msrun.sh;
  GLOO_SOCKET_IFNAME
      the card of the node.
Nodes are called node0, node1, ... and reach each other under these names too.

  python -m tests.cluster --nodes 2 --rate 200mbit -- python -m pangu.train experiment=quickstart
  python -m tests.cluster --nodes 2 --rate 200mbit -- torchrun --nproc-per-node 2 -m pangu.train ...
  python -m tests.cluster --nodes 3 -- sh -c 'hostname; ip address show eth0'

The exit code is that of the first node that failed, 0 without one, 2 where there can be no cluster.
It needs root on Linux, with iproute2 and util-linux.
"""


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    before, command = _split(arguments)
    parser = argparse.ArgumentParser(
        "python -m tests.cluster",
        description=__doc__,
        epilog=USAGE,
        usage="python -m tests.cluster [--nodes N] [--rate RATE] -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument(
        "--rate",
        help="what every node's link lets through each way, in tc's words: 200mbit, 1gbit "
        "(default: all there is)",
    )
    options = parser.parse_args(before)
    if not command:
        parser.error("no COMMAND: write it behind --")
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with Cluster(options.nodes, options.rate) as cluster:
            return _run(cluster, command)
    except (ClusterError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _run(cluster: Cluster, command: Sequence[str]) -> int:
    interrupts: list[int] = []
    # A handler of our own, so that Ctrl-C is heard at any moment, also where a shell's background
    # job was started deaf to it; the nodes' commands then start with the default again.
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    with cluster.counted() as links:
        processes = [
            node.start(
                command,
                env=cluster.environment(node),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for node in cluster.nodes
        ]
        with _shown(processes):
            code = _wait(processes, interrupts)
    print(*_table(cluster, links), sep="\n", flush=True)
    return code


@contextlib.contextmanager
def _shown(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Every line that a node writes, behind the node's name."""

    def show(rank: int, lines: IO[bytes]) -> None:
        for line in lines:
            text = f"node{rank}: {line.decode(errors='replace').rstrip()}\n"
            sys.stdout.write(text)
            sys.stdout.flush()

    readers = []
    for rank, process in enumerate(processes):
        assert process.stdout is not None
        readers.append(threading.Thread(target=show, args=(rank, process.stdout), daemon=True))
        readers[-1].start()
    yield
    for reader in readers:
        reader.join(timeout=5)  # what has left its own processes behind keeps the pipe open


def _wait(processes: Sequence[subprocess.Popen[bytes]], interrupts: list[int]) -> int:
    """The exit code of the first to fail. The others have some time to end; Ctrl-C reaches all."""
    first, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if interrupts:
            interrupts.clear()
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            first, deadline = first or 128 + signal.SIGINT, time.monotonic() + LEAVE
        if not first:
            first = next((_code(process) for process in processes if process.poll()), 0)
            deadline = time.monotonic() + LEAVE if first else deadline
        if time.monotonic() > deadline:
            ended = [r for r, process in enumerate(processes) if process.poll() is None]
            names = ", ".join(f"node{rank}" for rank in ended)
            print(f"{names} did not end within {LEAVE:.0f} s of the first: killed", flush=True)
            for rank in ended:
                processes[rank].kill()
                processes[rank].wait()
    return first or next((_code(process) for process in processes if process.poll()), 0)


def _code(process: subprocess.Popen[bytes]) -> int:
    return process.returncode if process.returncode > 0 else 128 - process.returncode


def _table(cluster: Cluster, links: Sequence[Link]) -> Iterator[str]:
    rate = cluster.rate or "not limited"
    yield f"{'link':<6} {'rate':>11} {'bytes sent':>15} {'bytes received':>15}"
    for node, link in zip(cluster.nodes, links, strict=True):
        yield f"{node.name:<6} {rate:>11} {link.sent:>15} {link.received:>15}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
