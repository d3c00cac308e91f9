"""The lines that a run prints about its forecast."""

import pytest

from configs.compose import load
from pangu.training.forecast import announce, compare, forecast
from simulator.predict import Forecast

RUN = ["model=moge_tiny", "data=synthetic", "train.micro_batch_size=4"]


def test_no_machine_no_forecast() -> None:
    assert forecast(load(RUN), 1) is None


def test_an_impossible_forecast_says_why() -> None:
    config = load([*RUN, "hardware=a100", "backend.precision=fp8"])
    reason = forecast(config, 1)
    assert isinstance(reason, str)
    assert announce(reason).startswith("no forecast: hardware.peak_tflops=fp8: a100 computes in")


def test_the_run_is_compared_with_its_forecast_after_the_warm_up() -> None:
    expected = forecast(load([*RUN, "hardware=a100"]), 1)
    assert isinstance(expected, Forecast)
    assert announce(expected).startswith("forecast: ")
    step, memory = expected.step_seconds, expected.peak_memory_gib
    slow = [{"step": n, "step_seconds": 100.0, "memory_gib": 1.0} for n in (1, 2)]
    rows = [{"step": n, "step_seconds": 2 * step, "memory_gib": memory / 2} for n in (3, 4, 5)]
    line = compare(expected, [*slow, {"step": 4, "validation_loss": 1.0}, *rows])
    assert line is not None
    assert "(-50%)" in line
    assert "(+100%)" in line
    assert compare(expected, slow) is None


def test_a_machine_may_state_what_a_process_and_a_step_cost() -> None:
    plain = forecast(load([*RUN, "hardware=a100"]), 1)
    costly = forecast(
        load([*RUN, "hardware=a100", "hardware.process_base_bytes=2147483648",
              "hardware.launch_us.step=1e6"]), 1
    )  # fmt: skip
    assert isinstance(plain, Forecast)
    assert isinstance(costly, Forecast)
    assert costly.peak_memory_gib - plain.peak_memory_gib == pytest.approx(2.0)
    assert costly.step_seconds - plain.step_seconds == pytest.approx(1.0)
