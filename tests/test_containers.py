"""What images are made from, as far as it shows without building one (docs/containers.md)."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from cluster.privileges import needs_cluster

from configs.check import load_checked

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def test_images_get_the_requirements_of_the_extras_and_of_the_extras_they_name():
    command = [sys.executable, DOCKER / "dependencies.py", "npu", "serve"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["train"], *extras["npu"], *extras["serve"]}
    assert sorted(done.stdout.splitlines()) == sorted(wanted - {"pangu-moe[train]"})


def test_the_entry_point_runs_our_commands_and_any_other(tmp_path: Path):
    script = DOCKER / "entrypoint.sh"
    commands = re.search(r"^(train .*)\)$", script.read_text(), re.MULTILINE).group(1).split(" | ")
    assert {"train", "doctor", "serve"} <= set(commands)
    for name in commands:
        assert find_spec(f"pangu.{name}"), name
    python = tmp_path / "python"  # says what it was asked for
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words, asked in (
        (["train", "a=b c"], "python -m pangu.train a=b c"),
        (["simulate", "predict"], "python -m simulator predict"),
        (["echo", "something"], "something"),
    ):
        done = subprocess.run([script, *words], env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, asked), done.stderr


def services():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def test_the_compose_file_fits_the_specifications_schema(tmp_path: Path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("depends_on:", "depend_on:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    command += ["--output-format", "json", DOCKER / "compose.yaml", wrong]
    found = json.loads(subprocess.run(command, capture_output=True).stdout)
    (error,) = found["errors"]
    assert (error["filename"], error["path"]) == (str(wrong), "$.services.node1")
    assert "'depend_on' was unexpected" in error["message"]


def test_the_two_nodes_of_compose_train_what_there_is():
    ranks = set()
    for service in services().values():
        launcher, _, module, *overrides = service["command"].split()
        assert (launcher, module) == ("torchrun", "pangu.train")
        assert load_checked(overrides).train.steps == 50
        assert (
            ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]
        ).exists()
        ranks.add(service["environment"]["PET_NODE_RANK"])
        assert service["environment"]["PET_NNODES"] == str(len(services()))
        assert service["environment"]["PET_MASTER_ADDR"] in services()
    assert ranks == {"0", "1"}


@pytest.mark.distributed
@needs_cluster
def test_the_two_nodes_of_compose_meet_and_train(tmp_path: Path):
    """What its services run, told what its services are told, each in a folder of its own, with one
    for both in the place of the volume. Shorter, and on numbers that need not be prepared."""
    (volume,) = {volume for service in services().values() for volume in service["volumes"]}
    runs = volume.partition(":")[2]
    short = ["data=synthetic", "train.steps=2", "train.global_batch_size=4"]
    short += ["train.micro_batch_size=2", "train.seq_length=32", "train.validate_every=0"]
    started = []
    with Cluster(2) as cluster:
        nodes = {node.name: node for node in cluster.nodes}
        for name, service in services().items():
            own = tmp_path / name
            own.mkdir()
            words = [word.replace(runs, str(tmp_path)) for word in service["command"].split()]
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            told = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            told |= service["environment"]
            started.append(nodes[name].start([*words, *short], env=told, cwd=own))
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    lines = (tmp_path / "two_nodes/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
