"""Real torchrun, real msrun and our own local start, with real processes that meet over gloo."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Node
from cluster.privileges import needs_cluster

from launch.port import free_port, obstacle

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FACTS = str(Path(__file__).parent / "rank_facts.py")


def environ(**more: str) -> dict[str, str]:
    """A user's shell with the trainer's environment activated."""
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def expected(launcher: str, local_ranks: tuple[int, int]) -> list[dict[str, Any]]:
    """Two ranks that add up rank + 1."""
    return [
        {"launcher": launcher, "rank": rank, "world_size": 2, "local_rank": local, "sum": 3.0}
        for rank, local in enumerate(local_ranks)
    ]


def test_torchrun_on_one_node(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", FACTS]
    subprocess.run([*command, str(tmp_path)], env=environ(), check=True, timeout=120)
    assert facts(tmp_path) == expected("torchrun", (0, 1))


def test_a_refusal_is_said_once_and_ends_torchruns_account(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc-per-node=3", f"--master-port={free_port()}", "-m"]
    command += [
        "pangu.train",
        "train.global_batch_size=3",
        "parallel.pipeline_model_parallel_size=2",
    ]
    result = subprocess.run(
        command, env=environ(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, "torchrun's own"
    assert result.stderr.count(" to mend ") == 1
    account = result.stderr.rpartition("Root Cause")[2]
    assert "exitcode  : 2" in account
    assert (
        "WORLD_SIZE=3: tensor x pipeline x context parallel = 1 x 2 x 1 = 2 does not divide 3 ranks"
    ) in account
    assert result.stderr.count("exitcode  : 2") == 1, "the others were still there to be ended"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_nodes() -> Iterator[tuple[Node, ...]]:
    with Cluster(2) as cluster:
        yield cluster.nodes


@needs_cluster
def test_torchrun_on_two_nodes(tmp_path: Path, two_nodes: tuple[Node, ...]) -> None:
    started = [
        subprocess.Popen(
            [
                *node.prefix,
                str(BIN / "torchrun"),
                "--nnodes=2",
                f"--node-rank={rank}",
                "--nproc-per-node=1",
                f"--master-addr={two_nodes[0].address}",
                "--master-port=29500",
                FACTS,
                str(tmp_path),
            ],
            env=environ(GLOO_SOCKET_IFNAME=node.interface),
        )
        for rank, node in enumerate(two_nodes)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert facts(tmp_path) == expected("torchrun", (0, 0))


def port_of_msrun() -> int:
    """One that is free, and so is the next, which is torch's; below those that the system hands out
    to whoever asks for any."""
    some = random.sample(range(20_000, 32_000, 2), 100)
    return next(port for port in some if not obstacle(port) and not obstacle(port + 1))


def test_msrun_on_one_node(tmp_path: Path, msrun: Path) -> None:
    command = [str(msrun), "--worker_num=2", "--local_worker_num=2", "--join=True"]
    command += [f"--master_port={port_of_msrun()}", f"--log_dir={tmp_path / 'logs'}"]
    subprocess.run(
        [*command, "python", FACTS, str(tmp_path)], env=environ(), check=True, timeout=180
    )
    assert facts(tmp_path) == expected("msrun", (0, 1))


@needs_cluster
def test_msrun_on_two_nodes(tmp_path: Path, msrun: Path, two_nodes: tuple[Node, ...]) -> None:
    """Nothing but --node_rank tells the ranks of two nodes apart."""
    command = [str(msrun), "--worker_num=2", "--local_worker_num=1", "--join=True"]
    command += [f"--master_addr={two_nodes[0].address}", "--master_port=8118"]
    started = [
        subprocess.Popen(
            [
                *node.prefix,
                *command,
                f"--node_rank={rank}",
                f"--log_dir={tmp_path / str(rank)}",
                "python",
                FACTS,
                str(tmp_path),
            ],
            env=environ(GLOO_SOCKET_IFNAME=node.interface),
        )
        for rank, node in enumerate(two_nodes)
    ]
    assert [process.wait(timeout=180) for process in started] == [0, 0]
    assert facts(tmp_path) == expected("msrun", (0, 0))


def test_the_variables_of_srun(tmp_path: Path) -> None:
    """No Slurm here: its variables as srun would set them for two tasks on one node."""
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    started = [
        subprocess.Popen(
            [sys.executable, FACTS, str(tmp_path)],
            env=environ(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert facts(tmp_path) == expected("slurm", (0, 1))


SPAWN = """
import sys
from pathlib import Path
from pangu.local_launch import start_local
sys.exit(start_local([sys.executable, "-c", sys.argv[2]], 2, Path(sys.argv[1])))
"""


def spawn(tmp_path: Path, child: str) -> subprocess.Popen[str]:
    """`start_local` with two processes that run `child`."""
    return subprocess.Popen(
        [sys.executable, "-c", SPAWN, str(tmp_path), child],
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_local_ranks_and_their_output(tmp_path: Path) -> None:
    child = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
    output, _ = (process := spawn(tmp_path, child)).communicate(timeout=30)
    assert (process.returncode, output) == (0, "rank 0 of 2\n")
    assert (tmp_path / "logs/rank_1.log").read_text() == "rank 1 of 2\n"


def test_a_failing_rank_ends_the_others_and_is_shown(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit('ouch')"
    )
    process = spawn(tmp_path, child.replace("sys.exit('ouch')", "(print('ouch'), sys.exit(3))"))
    _, error = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "rank 1 failed with exit code 3" in error
    assert "  ouch" in error

    mistake = "import sys, time, os; time.sleep(int(os.environ['RANK']) == 0); "
    process = spawn(tmp_path, mistake + "print('yours', file=sys.stderr); sys.exit(2)")
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (2, "yours\n"), "said once, by rank 0"


@pytest.mark.parametrize("victim", [0, 1])
def test_who_was_killed_and_when_is_said_last(tmp_path: Path, victim: int) -> None:
    """Rank `victim` is killed, the other one fails for it, and is quicker to be seen."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7, "loss": 1}\n{"ste')
    child = (
        "import os, signal, time\n"
        f"if os.environ['RANK'] == '{victim}':\n"
        "    time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)\n"
        "print('waited in vain'); os._exit(4)\n"
    )
    output, error = (process := spawn(tmp_path, child)).communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    (line,) = error.splitlines()
    assert line.startswith(f"rank {victim} was ended by SIGKILL after step 7; where nobody sent it")
    assert output == ("waited in vain\n" if victim else "")

    crash = child.replace("SIGKILL", "SIGSEGV").replace("time.sleep(1);", "print('near');")
    _, error = (process := spawn(tmp_path, crash)).communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGSEGV
    last = error.splitlines()[-1]
    assert last.startswith(f"rank {victim} was ended by SIGSEGV after step 7. The same command")


def interrupted(folder: Path, received: signal.Signals, leave: str) -> subprocess.Popen[str]:
    """Two ranks that were sent a signal; they answer it with what the code defines as `leave`."""
    child = (
        f"import os, signal, sys, time\n{leave}"
        f"signal.signal({int(received)}, leave)\n"
        f"open(os.path.join({str(folder)!r}, 'up' + os.environ['RANK']), 'w')\n"
        "time.sleep(60)\n"
    )
    process = spawn(folder, child)
    wait_for(lambda: (folder / "up0").exists() and (folder / "up1").exists())
    process.send_signal(received)
    return process


def test_sigterm_reaches_every_rank(tmp_path: Path) -> None:
    leave = "def leave(*_): print('saved', flush=True); sys.exit(0)\n"
    process = interrupted(tmp_path, signal.SIGTERM, leave)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "saved\n")
    assert (tmp_path / "logs/rank_1.log").read_text() == "saved\n"


def test_ctrl_c_before_the_ranks_listen_is_silent(tmp_path: Path) -> None:
    process = interrupted(tmp_path, signal.SIGINT, "leave = signal.SIG_DFL\n")
    assert (*process.communicate(timeout=30), process.returncode) == ("", "", 130)


def bound_rank(folder: Path) -> str:
    """A rank that ends with its parent and leaves its number in `folder`."""
    return (
        "import os, time\n"
        "from pangu.processes import die_with_parent\n"
        "die_with_parent()\n"
        f"name = os.path.join({str(folder)!r}, 'pid' + os.environ['RANK'])\n"
        "open(name + '.new', 'w').write(str(os.getpid())); os.rename(name + '.new', name)\n"
        "time.sleep(60)\n"
    )


def pids_of_two(folder: Path) -> list[int]:
    """The numbers that two ranks have left."""
    files = [folder / f"pid{rank}" for rank in range(2)]
    wait_for(lambda: all(file.exists() for file in files), 60)
    return [int(file.read_text()) for file in files]


def test_a_killed_start_leaves_no_rank_behind(tmp_path: Path) -> None:
    process = spawn(tmp_path, bound_rank(tmp_path))
    pids = pids_of_two(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_a_killed_torchrun_leaves_no_rank_behind(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "--no-python"]
    process = subprocess.Popen(
        [*command, sys.executable, "-c", bound_rank(tmp_path)], env=environ()
    )
    pids = pids_of_two(tmp_path)
    time.sleep(1)
    assert all(alive(pid) for pid in pids), "torchrun's threads come and go"
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
