"""Models × hardware side by side: each pair with its best layout, or with the given one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.hardware import load_hardware
from simulator.predict import Forecast, predict
from simulator.search import search

PER_TRILLION = 1e12
JOULES_PER_MWH = 3.6e9


@dataclass(frozen=True)
class Pair:
    """One model on one machine. `config` and `prediction` are None where no layout works, and
    `reason` says why."""

    model: str
    hardware: str
    config: Config | None
    prediction: Forecast | None
    power_w: float | None  # of one device
    price_per_hour: float | None
    reason: str = ""

    @property
    def device_hours(self) -> float | None:
        """Device hours per trillion tokens."""
        if self.prediction is None:
            return None
        return PER_TRILLION / self.prediction.tokens_per_second_per_device / 3600

    @property
    def energy_mwh(self) -> float | None:
        """Energy of the devices per trillion tokens, at the power of their data sheet."""
        if self.device_hours is None or self.power_w is None:
            return None
        return self.device_hours * 3600 * self.power_w / JOULES_PER_MWH

    @property
    def cost(self) -> float | None:
        """Price per trillion tokens, in the currency of `hardware.price_per_hour`."""
        if self.device_hours is None or self.price_per_hour is None:
            return None
        return self.device_hours * self.price_per_hour

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; None where a figure is not known."""
        result: dict[str, Any] = {
            "model": self.model,
            "hardware": self.hardware,
            "reason": self.reason,
            "device_hours_per_trillion_tokens": self.device_hours,
            "energy_mwh_per_trillion_tokens": self.energy_mwh,
            "cost_per_trillion_tokens": self.cost,
        }
        names = "step_seconds tokens_per_second_per_device mfu peak_tflops peak_dtype"
        for name in f"{names} peak_memory_gib memory_gib fits".split():
            result[name] = getattr(self.prediction, name, None)
        if self.config is not None:
            result["parallel"] = vars(self.config.parallel)
            result["memory"] = vars(self.config.memory)
            result["train"] = {"micro_batch_size": self.config.train.micro_batch_size}
        return result


def compare(
    plans: Sequence[tuple[str, str, Callable[[], Config]]],
    *,
    given: bool,
    pinned: frozenset[str] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Forecast every (model, hardware, how to load its configuration).

    Args:
        given: forecast the layout of the configuration instead of searching for the best.
        pinned: configuration keys that keep their value in the search.
        progress: called with pairs done and in all.

    A pair that cannot work on its machine keeps its place with the reason.
    """
    pairs = []
    for done, (model, hardware, load) in enumerate(plans, start=1):
        pairs.append(_pair(model, hardware, load, given, pinned))
        if progress:
            progress(done, len(plans))
    return pairs


def _pair(
    model: str, hardware: str, load: Callable[[], Config], given: bool, pinned: frozenset[str]
) -> Pair:
    power = price = None
    try:
        config = load()
        machine = load_hardware(config.hardware)
        power, price = machine.power_w, machine.price_per_hour
        if given:
            prediction = predict(config)
        else:
            result = search(config, pinned=pinned, top=1)
            if not result.choices:
                return Pair(model, hardware, None, None, power, price, result.why_none)
            config, prediction = result.choices[0].config, result.choices[0].prediction
    except ConfigError as error:
        return Pair(model, hardware, None, None, power, price, _sentence(error.violations))
    reason = "" if prediction.fits else "does not fit the device's memory"
    return Pair(model, hardware, config, prediction, power, price, reason)


def _sentence(violations: list[Violation]) -> str:
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return f"{violations[0]}{more}"
