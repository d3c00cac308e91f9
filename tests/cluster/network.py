"""Nodes, links and the bridge between them, out of network namespaces, veth pairs and `tc … tbf`.

A node is a network namespace with a card `eth0` and a host name of its own; processes, files and
the clock are this machine's. Its card is one end of a veth pair, the other end hangs on a bridge in
one more namespace, the switch. Both ends let through `rate` and no more: what the node sends waits
at its card, what it receives at the switch.

Bytes are counted at the card, frames' headers included. Offloading stays on, as between hosts: up
to 64 KiB travel under one header, which is why headers are well below one percent of them.

Everything is named after the process that made it, with the time that it started at. Namespaces of
processes that are no more, and whatever still runs in them, go when the next cluster starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "pangu-cluster"
CARD = "eth0"
PORT = 29500
TOOLS = ("ip", "tc", "unshare", "setpriv")  # of iproute2 and util-linux
NODES = (1, 16)  # least, most
NETNS, ETC = Path("/run/netns"), Path("/etc/netns")
# One burst of 64 KiB, the largest that travels under one header, must pass whole.
BURST = 256 << 10
# What may wait before it is dropped: more than TCP has under way.
QUEUE = 64 << 20


class ClusterError(RuntimeError):
    """What `ip` or `tc` has refused, in its own words."""


def obstacle() -> str:
    """Why there can be no cluster on this machine; "" where there can."""
    if os.name != "posix" or not all(shutil.which(tool) for tool in TOOLS):
        return f"a cluster on one machine needs Linux with {', '.join(TOOLS)}"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    if os.geteuid() or made.returncode:
        return "a cluster on one machine needs root, with the right to make network namespaces"
    return ""


@dataclass(frozen=True)
class Link:
    """What a node's card has sent and received, in bytes."""

    sent: int
    received: int

    def __sub__(self, before: Link) -> Link:
        return Link(self.sent - before.sent, self.received - before.received)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    rank: int
    space: str  # its network namespace
    address: str
    switch: str  # the bridge's
    interface: str = CARD

    @property
    def name(self) -> str:
        """Its host name, which every node resolves."""
        return f"node{self.rank}"

    @property
    def port(self) -> str:
        """Its end of the cable at the switch."""
        return f"port{self.rank}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to write before a command to run it on this node; it ends with who starts it."""
        enter = ("ip", "netns", "exec", self.space, "setpriv", "--pdeathsig", "KILL")
        named = f'echo {self.name} > /proc/sys/kernel/hostname; exec "$@"'
        return (*enter, "unshare", "--uts", "sh", "-c", named, "sh")

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Run a command here, in a session of its own, so that Ctrl-C is left to who has started
        it. `options` are those of `Popen`. It is there on return: what ends the node ends it."""
        process = subprocess.Popen([*self.prefix, *command], start_new_session=True, **options)
        space = (NETNS / self.space).stat().st_ino
        wait_until(lambda: process.poll() is not None or _space(process.pid) == space, 30, "start")
        return process

    def link(self) -> Link:
        """What its card has sent and received so far."""
        (found,) = json.loads(_run("ip", "-n", self.space, "-j", "-s", "link", "show", CARD))
        return Link(found["stats64"]["tx"]["bytes"], found["stats64"]["rx"]["bytes"])

    def limit(self, rate: str | None) -> None:
        """Let through at most `rate` each way, in tc's words (200mbit); None for all there is."""
        for space, card in ((self.space, CARD), (self.switch, self.port)):
            tc = ("tc", "-n", space, "qdisc")
            if rate is None:
                _run(*tc, "replace", "dev", card, "root", "noqueue")
                continue
            _run(
                *(*tc, "replace", "dev", card, "root", "tbf", "rate", rate),
                *("burst", str(BURST), "limit", str(QUEUE)),
            )

    def cut(self) -> None:
        """Pull its cable out of the switch."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Put it back."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "up")

    def processes(self) -> list[int]:
        """The ids of the processes that run here."""
        return _processes(self.space)

    def kill(self) -> None:
        """End all that runs here at once, as a power cut does. Its link stays."""
        _end(self.space)

    def rendezvous(self, nodes: int, master: Node) -> dict[str, str]:
        """The environment in which `pangu.train` is one of `nodes` ranks, one to a node, and in
        which torchrun and the scripts in `launch/` know their peers without an option."""
        where = {"MASTER_ADDR": master.address, "MASTER_PORT": str(PORT)}
        return {
            **where,
            **{"RANK": str(self.rank), "WORLD_SIZE": str(nodes)},
            **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"NNODES": str(nodes), "NODE_RANK": str(self.rank)},
            **{"PET_NNODES": str(nodes), "PET_NODE_RANK": str(self.rank)},
            **{f"PET_{name}": value for name, value in where.items()},
            "GLOO_SOCKET_IFNAME": CARD,
        }


class Cluster:
    """Nodes and a switch. Made by `with`, and gone after it, with every process on the nodes.

    Raises:
        ValueError: a number of nodes that there cannot be.
        ClusterError: what `ip` or `tc` refuses, a rate for one.
    """

    def __init__(self, nodes: int, rate: str | None = None) -> None:
        least, most = NODES
        if not least <= nodes <= most:
            raise ValueError(f"{nodes} nodes: {least} to {most} can be made")
        owner = f"{PREFIX}-{os.getpid()}-{started_at(os.getpid())}-{_count()}"
        self._switch = f"{owner}-switch"
        self.rate = rate
        self.nodes = tuple(
            Node(rank, f"{owner}-node{rank}", f"10.87.0.{rank + 1}", self._switch)
            for rank in range(nodes)
        )

    def __enter__(self) -> Cluster:
        try:
            with _one_at_a_time():
                remove_leftovers()
                self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in (*(node.space for node in self.nodes), self._switch):
            _remove(space)

    def environment(self, node: Node) -> dict[str, str]:
        """This process's environment with the rendezvous of a node."""
        return {**os.environ, **node.rendezvous(len(self.nodes), self.nodes[0])}

    def run(self, command: Sequence[str], env: dict[str, str], **options: Any) -> list[int]:
        """The exit codes of a command on every node, with the rendezvous and `env` besides."""
        started = [
            node.start(command, env=self.environment(node) | env, **options) for node in self.nodes
        ]
        return [process.wait() for process in started]

    def links(self) -> list[Link]:
        """What every node's card has sent and received so far."""
        return [node.link() for node in self.nodes]

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[Link]]:
        """The list fills with what every link has carried meanwhile."""
        before, found = self.links(), []
        yield found
        found += [now - then for now, then in zip(self.links(), before, strict=True)]

    def _make(self) -> None:
        _run("ip", "netns", "add", self._switch)
        switch = ("ip", "-n", self._switch)
        _run(*switch, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        _only_ip_4(self._switch)
        _run(*switch, "link", "set", "bridge", "up")
        hosts = "127.0.0.1 localhost\n"
        hosts += "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        for node in self.nodes:
            folder = ETC / node.space  # `ip netns exec` lays its files over those of /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
            own = ("ip", "-n", node.space)
            _run("ip", "netns", "add", node.space)
            _only_ip_4(node.space)
            veth = ("link", "add", CARD, "type", "veth", "peer", "name", node.port)
            _run(*own, *veth, "netns", self._switch)
            _run(*own, "address", "add", f"{node.address}/24", "dev", CARD)
            _run(*switch, "link", "set", node.port, "master", "bridge", "up")
            for card in ("lo", CARD):
                _run(*own, "link", "set", card, "up")
            if self.rate is not None:
                node.limit(self.rate)


def remove_leftovers() -> list[str]:
    """End and remove what clusters of processes that are no more have left; their namespaces."""
    found = {path.name for folder in (NETNS, ETC) for path in folder.glob(f"{PREFIX}-*")}
    stale = sorted(name for name in found if not _owned(name))
    for name in stale:
        _remove(name)
    return stale


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: `what` did not come to pass.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.01)


_made = 0


def _count() -> int:
    global _made
    _made += 1
    return _made


def _owned(name: str) -> bool:
    pid, started = name.removeprefix(f"{PREFIX}-").split("-")[:2]
    return pid.isdecimal() and started_at(int(pid)) == started


def started_at(pid: int) -> str:
    """When a process has started, in the kernel's time; "" for none, or one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """`ip netns` mounts and unmounts: two at once have left namespaces that nobody could remove."""
    NETNS.mkdir(parents=True, exist_ok=True)
    with (NETNS.parent / f"{PREFIX}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _only_ip_4(space: str) -> None:
    """Version 6 reports to its neighbours unasked; without it every byte is a program's."""
    off = 'for name in all default; do echo 1 > "/proc/sys/net/ipv6/conf/$name/disable_ipv6"; done'
    _run("ip", "netns", "exec", space, "sh", "-c", f"test ! -d /proc/sys/net/ipv6 || {{ {off}; }}")


def _processes(space: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _space(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:  # it has ended
        return 0


def _end(space: str) -> None:
    deadline = time.monotonic() + 30
    while (pids := _living(space)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _living(space: str) -> list[int]:
    return [pid for pid in _processes(space) if started_at(pid)]


def _remove(space: str) -> None:
    if (NETNS / space).exists():
        _end(space)
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)
    shutil.rmtree(ETC / space, ignore_errors=True)
