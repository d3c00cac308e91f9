"""Every launcher's variables, mapped to one description of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import load
from configs.layout import ranks_per_node
from configs.violation import ConfigError
from launch.environment import LauncherError, ProcessEnvironment, first_node, read, tasks_per_node
from pangu.local_launch import prepare_environment
from pangu.preflight import resolve

MSRUN = {
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "16",
    "MS_SCHED_HOST": "10.0.0.1",
    "MS_SCHED_PORT": "8118",
    "DEVICE_ID": "3",
    "RANK_ID": "11",
}
TORCHRUN = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_STEP_NUM_TASKS": "15",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8,7",
    "SLURM_JOB_ID": "41234",
}


def test_alone() -> None:
    assert read({}) == ProcessEnvironment()
    assert not read({}).launched
    # the batch script itself, and an interactive shell, are no launched processes
    assert not read({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}).launched
    assert not read({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).launched


def test_torchrun() -> None:
    assert read(TORCHRUN) == ProcessEnvironment("torchrun", 11, 16, 3, 8, "10.0.0.1", 29500)
    assert read({**SLURM, **TORCHRUN}).launcher == "torchrun"
    assert read({**TORCHRUN, "PANGU_STARTED_BY": "local"}).launcher == "local"


def test_msrun_uses_the_port_after_its_own() -> None:
    assert read(MSRUN) == ProcessEnvironment("msrun", 11, 16, 3, 16, "10.0.0.1", 8119)
    assert read({**MSRUN, "LOCAL_WORLD_SIZE": "8"}).local_world_size == 8


def test_slurm() -> None:
    assert read(SLURM) == ProcessEnvironment("slurm", 11, 15, 3, 7, "node07", 20000 + 1234)
    own = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "5"}
    assert (read(own).master_addr, read(own).master_port) == ("head", 5)
    assert first_node("a[001-004,9],b2") == "a001"
    assert first_node("login1,a[1-2]") == "login1"
    assert first_node("solo") == "solo"
    assert first_node("a[5,7-9]") == "a5"
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({k: v for k, v in MSRUN.items() if k != "RANK_ID"}, "--node_rank"),
        ({k: v for k, v in MSRUN.items() if k != "MS_SCHED_HOST"}, "msrun set no MS_SCHED_HOST"),
        ({"RANK": "0"}, "torchrun set no WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "x"}, "RANK=x, which is no number"),
        ({**TORCHRUN, "RANK": "16"}, "rank 16 of 16"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x, which is no number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "0 of 16 processes are on this node"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many, which is no"),
        ({**SLURM, "SLURM_NODEID": "9"}, "srun says node 9, and tasks on nodes"),
        ({**SLURM, "MASTER_PORT": "-"}, "MASTER_PORT=-, which is no number"),
    ],
)
def test_refuses_with_a_hint(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(LauncherError, match=sentence):
        read(environ)


def train(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "MS_", "SLURM"))}
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pangu.train", *arguments],
        env={**inherited, "PYTHONPATH": root, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


def said(result: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(
        line for line in result.stderr.splitlines() if not line.startswith("import time:")
    )


def test_msrun_scheduler_copy_leaves_at_once(tmp_path: Path) -> None:
    result = train("run_dir=out", cwd=tmp_path, MS_ROLE="MS_SCHED")
    assert result.returncode == 0
    assert imported(result).isdisjoint({"torch", "hydra", "numpy"})
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_with_2_before_torch_and_without_files(tmp_path: Path) -> None:
    result = train("moe.top_k=3", "moe.top_kk=1", "run_dir=out", cwd=tmp_path)
    assert result.returncode == 2
    assert "moe.num_expert_groups" in said(result)
    assert "did you mean top_k" in said(result)
    assert "Traceback" not in said(result)
    assert "torch" not in imported(result)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_refused_before_any_process_starts(tmp_path: Path) -> None:
    arguments = ["data=indexed", "data.blend={nowhere/code: 1.0}", "run_dir=out"]
    result = train(*arguments, "launch.processes=2", "moe.top_k=3", cwd=tmp_path)
    assert result.returncode == 2
    rows = "".join(said(result).split())
    assert "thereisnofilenowhere/code.bin" in rows
    assert "thereisnofilenowhere/code.idx" in rows
    assert "moe.num_expert_groups" in said(result), "together with all else there is to mend"
    assert "torch" not in imported(result)
    assert list(tmp_path.iterdir()) == []
    # Another node may have them: the first process of each node speaks for it.
    for local_rank, count in ((0, 2), (3, 0)):
        node = {**TORCHRUN, "LOCAL_RANK": str(local_rank)}
        result = train(*arguments, "train.global_batch_size=16", cwd=tmp_path, **node)
        assert (result.returncode, said(result).count("data.blend")) == (2, count)


def test_folders_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folders = ["run_dir=file", "data.cache_dir=file/below"]
    for processes in (1, 2):
        result = train(*folders, f"launch.processes={processes}", cwd=tmp_path)
        assert result.returncode == 2
        assert said(result).count("cannot be written to: Not a directory") == 2
        assert "torch" not in imported(result)


def test_a_file_in_the_way_inside_the_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out" / "config.yaml").mkdir(parents=True)
    result = train("run_dir=out", "data=synthetic", "model.num_layers=2", cwd=tmp_path)
    assert result.returncode == 2
    assert "cannot be used: out/config.yaml: Is a directory" in said(result)
    assert "Traceback" not in said(result)


@pytest.mark.parametrize("name", ["checkpoints", "logs", "tensorboard", "tokenizer"])
def test_a_file_where_the_run_wants_a_folder_is_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    result = train("run_dir=out", "data=synthetic", "launch.processes=2", cwd=tmp_path)
    assert result.returncode == 2
    assert f"out/{name} cannot be written to: Not a directory" in said(result)
    assert "torch" not in imported(result)


def test_ctrl_c_during_the_start_is_no_traceback(tmp_path: Path) -> None:
    """The configuration is read from a pipe: once it is open, the start is under way."""
    os.mkfifo(tmp_path / "slow.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "pangu.train", "experiment=slow.yaml"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with (tmp_path / "slow.yaml").open("w"):
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (-signal.SIGINT, "")


def test_only_rank_0_speaks(tmp_path: Path) -> None:
    result = train("moe.top_k=3", cwd=tmp_path, **TORCHRUN)
    assert (result.returncode, said(result)) == (2, "")


def test_refusals_in_one_sentence(tmp_path: Path) -> None:
    no_rank = {k: v for k, v in MSRUN.items() if k != "RANK_ID"}
    for arguments, environ, sentence in (
        ([], no_rank, "--node_rank"),
        (["-m", "moe=moge,top_k"], {**TORCHRUN, "RANK": "0"}, "would repeat the sweep"),
        (["--steps", "5"], {}, "unknown option --steps"),
    ):
        result = train(*arguments, cwd=tmp_path, **environ)
        assert result.returncode == 2
        assert sentence in said(result)
        assert len(said(result).splitlines()) == 1


def test_processes_of_the_launcher_are_what_is_checked(tmp_path: Path) -> None:
    """experiment=quickstart asks for two processes; sixteen were started."""
    result = train("experiment=quickstart", cwd=tmp_path, **{**TORCHRUN, "RANK": "0"})
    assert result.returncode == 2
    assert "x 16 = 128" in said(result)


@pytest.mark.parametrize(
    ("environ", "variable", "option"),
    [
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "6"}, "WORLD_SIZE", "torchrun --nproc_per_node"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"},
            "WORLD_SIZE",
            "torchrun --nnodes x --nproc_per_node",
        ),
        (MSRUN, "MS_WORKER_NUM", "msrun --worker_num"),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"},
            "SLURM_STEP_NUM_TASKS",
            "srun --ntasks",
        ),
    ],
)
def test_another_number_of_processes_in_the_words_of_the_launcher(
    environ: dict[str, str], variable: str, option: str
) -> None:
    six = {**environ, variable: "6"}
    six |= {name: "0" for name in ("RANK", "RANK_ID", "SLURM_PROCID") if name in environ}
    with pytest.raises(ConfigError) as caught:
        resolve(read(six), ["parallel.expert_model_parallel_size=4", "devices=12"])
    texts = [str(violation) for violation in caught.value.violations]
    assert texts[:2] == [
        f"devices=12: {variable}=6: so many processes were started "
        f"(devices=6 or null; or {option}=12)",
        f"{variable}=6: expert x expert-tensor x pipeline parallel = 4 x 1 x 1 = 4 does not "
        f"divide 6 ranks ({option}=4 or 8)",
    ]


def test_nodes_are_those_that_a_launcher_started() -> None:
    four = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
    run = ["data=synthetic", "parallel.expert_model_parallel_size=4", "moe.dispatcher=hierarchical"]
    config, _ = resolve(read({**four, "LOCAL_WORLD_SIZE": "2"}), run)
    assert (config.launch.processes, config.launch.nodes) == (2, 2)
    assert ranks_per_node(config) == 2
    run[1] = "parallel.expert_model_parallel_size=2"
    with pytest.raises(ConfigError, match="lie inside one node of 4"):
        resolve(read({**four, "LOCAL_WORLD_SIZE": "4"}), run)


def test_threads_are_shared_among_the_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    config, process = load([]), ProcessEnvironment(local_world_size=2)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    exported = prepare_environment(config, process)
    assert os.environ["OMP_NUM_THREADS"] == "6"
    assert os.environ["MASTER_PORT"] == str(exported.master_port) != "0"
    os.environ["OMP_NUM_THREADS"] = "3"
    prepare_environment(config, process)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    config.backend.threads = 5
    prepare_environment(config, process)
    assert os.environ["OMP_NUM_THREADS"] == "5"
