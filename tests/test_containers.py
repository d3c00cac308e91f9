"""What images are made from, as far as it shows without building one (docs/containers.md)."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import yaml

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


def test_the_two_nodes_of_compose_train_what_there_is():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    ranks = set()
    for service in services.values():
        launcher, _, module, *overrides = service["command"].split()
        assert (launcher, module) == ("torchrun", "pangu.train")
        assert load_checked(overrides).train.steps == 50
        assert (
            ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]
        ).exists()
        ranks.add(service["environment"]["PET_NODE_RANK"])
        assert service["environment"]["PET_NNODES"] == str(len(services))
        assert service["environment"]["PET_MASTER_ADDR"] in services
    assert ranks == {"0", "1"}
