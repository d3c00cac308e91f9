"""Who is told of a run: Prometheus, which reads, and MLflow, which is written to."""

import socket
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow.entities import RunStatus
from mlflow.tracking import MlflowClient
from prometheus_client.parser import text_string_to_metric_families
from test_resilience import finish, losses, start, train, wait_for

from configs.check import load_checked
from configs.violation import ConfigError
from launch.port import free_port
from pangu.preflight import no_mlflow
from pangu.report.run_files import METRICS, read_metrics
from pangu.training.mlflow import MlflowRun
from pangu.training.prometheus import Exporter
from pangu.training.run import watchers


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that MLflow takes for a server's."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "mlflow"


def scraped(port: int) -> dict[str, tuple[float, dict[str, str]]]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {sample.name: (sample.value, sample.labels) for sample in samples}


def test_the_newest_row_is_told_and_tokens_add_up():
    degrees = [41.0]
    exporter = Exporter(
        port := free_port(), sensors=lambda: {"device_temperature_celsius": degrees[0]}, run="first"
    )
    degrees[0] = 42.0  # asked at every request
    assert scraped(port) == {
        "pangu_train_tokens_total": (0.0, {"run": "first"}),
        "pangu_train_device_temperature_celsius": (42.0, {"run": "first"}),
    }
    exporter.write({"step": 1, "loss": 2.5, "tokens": 100, "beside": "save"})
    exporter.write({"step": 1, "validation_loss": 2.75})
    exporter.write({"step": 2, "loss": None, "tokens": 50})
    found = {name: value for name, (value, labels) in scraped(port).items()}
    assert found == {
        "pangu_train_tokens_total": 150,
        "pangu_train_step": 2,
        "pangu_train_validation_loss": 2.75,
        "pangu_train_device_temperature_celsius": 42.0,
    }
    exporter.close()
    with socket.create_server(("127.0.0.1", port)):
        pass  # free again


def test_mlflow_gives_back_what_it_was_told(store):
    run = MlflowRun(str(store), experiment="small", name="first", parameters={"moe.top_k": 4})
    second = MlflowRun(str(store), experiment="small", name="first", parameters={})
    for step in range(1, 101):
        run.write({"step": step, "loss": 1 / step, "z_loss": float("nan"), "beside": "save"})
    run.write({"step": 100, "validation_loss": None})
    run.close()
    client = MlflowClient(str(store))
    history = client.get_metric_history(run.id, "loss")
    assert [(each.step, each.value) for each in history] == [(n, 1 / n) for n in range(1, 101)]
    kept = client.get_run(run.id)
    assert set(kept.data.metrics) == {"loss"}
    assert kept.data.params == {"moe.top_k": "4"}
    assert kept.info.run_name == "first"
    assert kept.info.status == RunStatus.to_string(RunStatus.FINISHED)
    assert kept.info.experiment_id == client.get_run(second.id).info.experiment_id
    second.close()


def test_mlflow_that_cannot_be_told_is_refused_by_the_key(monkeypatch, capsys):
    nobody = f"http://127.0.0.1:{free_port()}"
    config = load_checked([f"watch.mlflow={nobody}"])
    assert no_mlflow(config) == []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError) as caught:
        watchers(config)
    (violation,) = caught.value.violations
    assert (violation.key, violation.value) == ("watch.mlflow", nobody)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (violation,) = no_mlflow(config)
    assert (violation.key, violation.suggestion) == ("watch.mlflow", "pip install mlflow-skinny")


def test_a_server_that_goes_away_is_said_once(store, capsys):
    run = MlflowRun(str(store), experiment="small", name="first", parameters={})
    MlflowClient(str(store)).delete_run(run.id)  # what is deleted takes no more rows
    run.write({"step": 1, "loss": 1.0})
    run.close()
    assert capsys.readouterr().err.count("warning: watch.mlflow") == 1


@pytest.mark.end_to_end
def test_rank_0_of_a_run_tells_both_and_a_taken_port_is_refused(tmp_path, store):
    port = free_port()
    wanted = (f"watch.prometheus_port={port}", "launch.processes=2")
    process = start(tmp_path, "train.steps=100000", f"watch.mlflow={store}", *wanted)
    try:
        wait_for(process, lambda: len(losses(tmp_path)) >= 2)
        found = scraped(port)
        code, output = train(tmp_path / "second", "train.steps=1", *wanted)
    finally:
        process.terminate()
        first_code, _ = finish(process)
    rows = read_metrics(tmp_path / METRICS)
    step, labels = found["pangu_train_step"]
    assert labels["run"] == tmp_path.name
    row = next(row for row in rows if row["step"] == step)
    assert found["pangu_train_loss"][0] == pytest.approx(row["loss"])
    assert not any("device_temperature" in name or "device_memory" in name for name in found)
    assert first_code == 0
    client = MlflowClient(str(store))
    (experiment,) = client.search_experiments(filter_string="name = 'moge_tiny'")
    (run,) = client.search_runs([experiment.experiment_id])
    told = client.get_metric_history(run.info.run_id, "loss")
    assert {each.step: each.value for each in told} == losses(tmp_path)
    assert run.data.params["launch.processes"] == "2"
    assert code == 2
    for words in ("watch.prometheus_port", str(port), "is in use on this machine"):
        assert words in output
    assert not (tmp_path / "second").exists()
