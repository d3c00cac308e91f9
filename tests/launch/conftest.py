"""Two machines and an msrun, as real as one machine allows."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINDSPORE = "mindspore==2.10.0"


@dataclass(frozen=True)
class Node:
    """A machine: what to write before a command, its address and its network card."""

    prefix: tuple[str, ...]
    address: str
    interface: str


@pytest.fixture
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two network namespaces joined by a cable; skipped where they may not be made."""
    names = [f"pangu{os.getpid()}{side}" for side in "ab"]
    cards = [f"pv{os.getpid()}{side}" for side in "ab"]
    script = f"""set -e
        ip netns add {names[0]}; ip netns add {names[1]}
        ip link add {cards[0]} netns {names[0]} type veth peer name {cards[1]} netns {names[1]}
    """
    for name, card, address in zip(names, cards, ("10.87.0.1", "10.87.0.2"), strict=True):
        script += f"""
        ip -n {name} address add {address}/24 dev {card}
        ip -n {name} link set {card} up; ip -n {name} link set lo up
        """
    made = shutil.which("ip") and subprocess.run(["bash", "-c", script], capture_output=True)
    try:
        if not made or made.returncode:
            pytest.skip("network namespaces need ip and the right to make them")
        first, second = (
            Node(("ip", "netns", "exec", name), address, card)
            for name, card, address in zip(names, cards, ("10.87.0.1", "10.87.0.2"), strict=True)
        )
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="session")
def msrun() -> Path:
    """msrun in an environment of its own, kept in .cache for the next time."""
    folder = ROOT / ".cache" / MINDSPORE.replace("==", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
            pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q", MINDSPORE]
            installed = subprocess.run(pip, capture_output=True, text=True)
            if installed.returncode:
                pytest.skip(f"{MINDSPORE} cannot be installed: {installed.stderr.splitlines()[-1]}")
            (folder / "installed").touch()
    return folder / "venv/bin/msrun"
