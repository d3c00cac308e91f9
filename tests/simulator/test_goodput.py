"""Goodput against simulated failures and the classical formulas."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.violation import ConfigError
from simulator.__main__ import application
from simulator.goodput import best_interval, daly_interval, expected_seconds, goodput


def simulated(mtbf: float, interval: float, cost: float, restart: float) -> float:
    """Useful share of a long run with failures drawn one by one."""
    rng = np.random.default_rng(3)
    clock = 0.0
    intervals = 20_000
    for _ in range(intervals):
        while (failure := rng.exponential(mtbf)) < interval + cost:
            clock += failure
            while (failure := rng.exponential(mtbf)) < restart:
                clock += failure
            clock += restart
        clock += interval + cost
    return intervals * interval / clock


def test_expectation_agrees_with_drawn_failures() -> None:
    # 1,000 s between failures, 200 s of work, 30 s of checkpoint, 60 s of restart.
    result = goodput(10.0, 10_000 / 3600, 30.0, 60.0, interval_seconds=200.0)
    assert result.mtbf == pytest.approx(1000.0)
    assert result.goodput == pytest.approx(simulated(1000.0, 200.0, 30.0, 60.0), rel=0.01)
    parts = result.goodput + result.checkpointing + result.lost_work + result.restarting
    assert parts == pytest.approx(1.0)
    assert result.lost_work > 0
    assert result.restarting > 0


def test_best_interval_is_the_minimum_and_close_to_young_and_daly() -> None:
    mtbf, cost = np.array([3600.0, 86_400.0]), 60.0
    best = best_interval(mtbf, cost)
    at_best = expected_seconds(mtbf, best, cost, 300.0) / best
    for factor in (0.9, 1.1):
        other = expected_seconds(mtbf, factor * best, cost, 300.0) / (factor * best)
        assert (other > at_best).all()
    assert best == pytest.approx(daly_interval(mtbf, cost), rel=0.002)
    assert best == pytest.approx(np.sqrt(2 * cost * mtbf), rel=0.13)
    assert best[1] == pytest.approx(np.sqrt(2 * cost * mtbf[1]), rel=0.02)


def test_larger_clusters_lose_more() -> None:
    result = goodput(np.array([1e3, 1e4, 1e5]), 50_000.0, 30.0, 600.0)
    assert (np.diff(result.goodput) < 0).all()
    assert (np.diff(result.interval) < 0).all()
    assert result.goodput[0] > 0.97


def test_failures_per_day_follow_from_the_rate() -> None:
    """A device that fails every 24,000 hours: a thousand of them fail once a day."""
    result = goodput(np.array([1000.0, 4000.0]), 24_000.0, 30.0, 600.0)
    assert result.failures_per_day == pytest.approx([1.0, 4.0])


def test_command_line_shows_a_range_unless_a_rate_is_given() -> None:
    command = [sys.executable, "-m", "simulator", "goodput", "--devices", "1000", "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["rows"]
    assert [row["device_mtbf_hours"] for row in shown] == [10_000, 30_000, 100_000]
    assert shown[0]["goodput"] < shown[1]["goodput"] < shown[2]["goodput"]
    one = [*command, "--mtbf-hours", "24000"]
    rows = json.loads(subprocess.run(one, capture_output=True, check=True).stdout)["rows"]
    assert [row["failures_per_day"] for row in rows] == pytest.approx([1.0])
    wrong = subprocess.run([*command, "--mtbf-hours", "often"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--mtbf-hours=often" in wrong.stderr
    assert "numbers with commas" in wrong.stderr


def test_a_run_gives_its_checkpoint_and_its_useful_tokens() -> None:
    run = ["model=pangu_pro_moe", "parallel=pangu_pro", "hardware=ascend_910b_376t"]
    run += ["devices=4000", "train.global_batch_size=1000", "train.seq_length=4096", "--json"]
    shown = {}
    for name in ("goodput", "predict"):
        command = [sys.executable, "-m", "simulator", name, *run]
        shown[name] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    fullest = max(
        stage["memory_gib"]["weights"] + stage["memory_gib"]["optimizer"]
        for stage in shown["predict"]["stages"]
    )
    # 25 GB/s to the host.
    assert shown["goodput"]["checkpoint_seconds"] == pytest.approx(fullest * 2**30 / 25e9)
    for row in shown["goodput"]["rows"]:
        assert row["devices"] == 4000
        useful = shown["predict"]["tokens_per_second"] * row["goodput"]
        assert row["tokens_per_second"] == pytest.approx(useful)
    twice = [sys.executable, "-m", "simulator", "goodput", *run, "--devices", "8"]
    refused = subprocess.run(twice, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--devices=8: a run has its own" in refused.stderr


def test_impossible_inputs_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)devices=0.*restart_seconds=nan"):
        goodput(0, 1000.0, 1.0, float("nan"))


def written_in_background(
    mtbf: float, interval: float, cost: float, restart: float, write: float
) -> float:
    """Useful share with failures drawn one by one, where a checkpoint counts once it is written,
    `write` seconds after training went on."""
    rng = np.random.default_rng(5)
    clock = useful = 0.0
    for _ in range(40_000):
        done = (rng.exponential(mtbf)) / (interval + cost)  # intervals until the failure
        whole = int(done)
        clock += done * (interval + cost) + restart
        safe = whole if (done - whole) * (interval + cost) >= write else max(whole - 1, 0)
        useful += safe * interval
    return useful / clock


def test_a_checkpoint_counts_once_it_is_written() -> None:
    """Restarts are short here, so that none is itself interrupted."""
    result = goodput(10.0, 100_000 / 3600, 3.0, 5.0, interval_seconds=300.0, write_seconds=200.0)
    drawn = written_in_background(10_000.0, 300.0, 3.0, 5.0, 200.0)
    assert result.goodput == pytest.approx(drawn, abs=0.003)
    whole = result.goodput + result.checkpointing + result.lost_work + result.restarting
    assert whole == pytest.approx(1.0)
    # Left to choose, the next checkpoint waits until this one is written.
    assert goodput(10.0, 100_000 / 3600, 3.0, 5.0, write_seconds=900.0).interval == 900.0
    with pytest.raises(ConfigError, match="takes 200 s to write, longer than this"):
        goodput(10.0, 28.0, 3.0, 5.0, interval_seconds=60.0, write_seconds=200.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "0"], "--devices=0.0: must be a positive, finite number"),
        (["--devices", "8,1e400"], "--devices=inf: must be"),
        (["--restart-seconds", "-1"], "--restart-seconds=-1.0: must be"),
        (["--mtbf-hours", "1e-9"], "--mtbf-hours=1e-09: devices then fail so often"),
        (["--checkpoint-seconds", "1e12"], "--mtbf-hours=10000.0: devices then fail so often"),
    ],
)
def test_nonsense_is_a_sentence(arguments, sentence) -> None:
    done = CliRunner().invoke(application(["goodput"]), ["goodput", *arguments])
    assert isinstance(done.exception, ConfigError)  # `main` prints it and exits with 2
    assert str(done.exception).startswith(sentence)
