"""launch/kubernetes: right by Kubernetes' own schemas, and what the pods are told is what the
launchers read."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from test_launchers import BIN, FACTS, ROOT, environ, expected, facts

from launch.port import free_port

FOLDER = ROOT / "launch/kubernetes"
VERSION = "1.36"


def documents(name: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / name).read_text())}


def replicas() -> dict[str, dict[str, Any]]:
    return documents("pytorchjob.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]


def test_the_job_and_its_service_fit_their_schemas() -> None:
    found = documents("job.yaml")
    assert set(found) == {"Service", "Job"}
    for document in found.values():
        kubernetes_validate.validate(document, VERSION, strict=True)
    found["Job"]["spec"]["completionmode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found["Job"], VERSION, strict=True)


def test_the_operators_pods_fit_their_schema() -> None:
    """The rest of a PyTorchJob is the operator's, whose schema no package brings."""
    assert set(replicas()) == {"Master", "Worker"}
    for replica in replicas().values():
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pangu"}}
        template["template"] = replica["template"]
        kubernetes_validate.validate(template, VERSION, strict=True)
        assert [each["name"] for each in replica["template"]["spec"]["containers"]] == ["pytorch"]


def test_pods_of_the_job_tell_the_launcher_what_it_reads() -> None:
    job, service = (documents("job.yaml")[kind] for kind in ("Job", "Service"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {each["name"]: each.get("value", "") for each in container["env"]}
    script = (ROOT / container["command"][0]).read_text()
    assert set(told) <= set(re.findall(r"\$\{(\w+):-", script))
    assert os.access(ROOT / container["command"][0], os.X_OK)
    nodes = job["spec"]["completions"]
    assert told["NNODES"] == str(nodes) == str(job["spec"]["parallelism"])
    assert told["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


@pytest.mark.distributed
def test_pods_of_the_operator_meet(tmp_path: Path) -> None:
    """Its command, told by the variables that the operator sets, where they are one on one host."""
    command = replicas()["Master"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["torchrun", "-m", "pangu.train"]
    port = str(free_port())
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [str(BIN / command[0]), FACTS, str(tmp_path)],
            env=environ(**told, PET_MASTER_PORT=port, PET_NODE_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert facts(tmp_path) == expected("torchrun", (0, 0))
