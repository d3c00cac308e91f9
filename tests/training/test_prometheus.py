"""A run that Prometheus reads."""

import socket
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_resilience import finish, losses, start, train, wait_for

from launch.port import free_port
from pangu.report.run_files import METRICS, read_metrics
from pangu.training.prometheus import Exporter


def scraped(port: int) -> dict[str, tuple[float, dict[str, str]]]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {sample.name: (sample.value, sample.labels) for sample in samples}


def test_the_newest_row_is_told_and_tokens_add_up():
    exporter = Exporter(port := free_port(), run="first")
    assert scraped(port) == {"pangu_train_tokens_total": (0.0, {"run": "first"})}
    exporter.write({"step": 1, "loss": 2.5, "tokens": 100, "beside": "save"})
    exporter.write({"step": 1, "validation_loss": 2.75})
    exporter.write({"step": 2, "loss": None, "tokens": 50})
    found = {name: value for name, (value, labels) in scraped(port).items()}
    assert found == {
        "pangu_train_tokens_total": 150,
        "pangu_train_step": 2,
        "pangu_train_validation_loss": 2.75,
    }
    exporter.close()
    with socket.create_server(("127.0.0.1", port)):
        pass  # free again


@pytest.mark.end_to_end
def test_rank_0_of_a_run_answers_and_a_taken_port_is_refused(tmp_path):
    port = free_port()
    wanted = (f"watch.prometheus_port={port}", "launch.processes=2")
    process = start(tmp_path, "train.steps=100000", *wanted)
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
    assert first_code == 0
    assert code == 2
    for words in ("watch.prometheus_port", str(port), "is in use on this machine"):
        assert words in output
    assert not (tmp_path / "second").exists()
