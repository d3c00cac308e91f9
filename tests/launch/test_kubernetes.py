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
from kubeflow.training import models
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


def as_kubeflow_has_it(value: Any, kind: str) -> Any:
    """What the classes that Kubeflow makes of its own schema take; of Kubernetes' own kinds, all.

    Raises:
        AssertionError: a field that is not there, or of another type.
        ValueError: one that must be there is not.
    """
    if kind.startswith("dict("):
        inner = kind.removeprefix("dict(str, ").removesuffix(")")
        return {name: as_kubeflow_has_it(each, inner) for name, each in value.items()}
    if not kind.startswith("KubeflowOrg"):
        assert (
            not (plain := {"str": str, "int": int, "bool": bool}.get(kind)) or type(value) is plain
        )
        return value
    model = getattr(models, kind)
    fields = {name: field for field, name in model.attribute_map.items()}
    assert set(value) <= set(fields), f"{kind} has no {set(value) - set(fields)}"
    given = {
        fields[name]: as_kubeflow_has_it(each, model.openapi_types[fields[name]])
        for name, each in value.items()
    }
    return model(**given)


def test_the_operators_job_is_what_the_operator_takes() -> None:
    """By Kubeflow's own classes. To them a policy is any word; the choices are as documented."""
    job = documents("pytorchjob.yaml")["PyTorchJob"]
    kind = "KubeflowOrgV1PyTorchJob"
    taken = as_kubeflow_has_it(job, kind)
    assert taken.spec.run_policy.clean_pod_policy in ("None", "Running", "All")
    for replica in taken.spec.pytorch_replica_specs.values():
        assert replica.restart_policy in ("Always", "OnFailure", "Never", "ExitCode")
    job["spec"]["runPolicy"]["backOffLimit"] = 20
    with pytest.raises(AssertionError, match="backOffLimit"):
        as_kubeflow_has_it(job, kind)
    del job["spec"]["runPolicy"]["backOffLimit"], job["spec"]["pytorchReplicaSpecs"]
    with pytest.raises(ValueError, match="pytorch_replica_specs"):
        as_kubeflow_has_it(job, kind)


def test_the_operators_pods_fit_their_schema() -> None:
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
