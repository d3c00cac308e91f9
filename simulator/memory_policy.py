"""`memory=auto`: which modules are recomputed and which swapped, so that a run stays below
`memory.limit_gib`, by what each way costs and what it frees.

The trainer, the doctor and the planner ask the same function, whose answer depends on the
configuration alone: every rank of a job finds the same modules by itself.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from configs.run_rules import memory as memory_rules
from configs.run_rules import swap_limits
from configs.schema import Config, MemoryConfig, RecomputeModule
from configs.violation import ConfigError, Violation
from simulator.predict import predict

Way = Literal["recompute", "swap"]
Treated = tuple[RecomputeModule, Way]
# A measured peak may be so much higher than the forecast.
MARGIN = 0.1
WHOLE = "whole layers"
_DONE = {"recompute": "recomputed", "swap": "swapped"}


@dataclass(frozen=True)
class Choice:
    """A module of which less is kept: what that releases of the fullest rank's peak, in GiB, and
    adds to a step, in seconds, beside those listed before it."""

    module: str
    way: Way
    released_gib: float
    added_seconds: float


@dataclass(frozen=True)
class Policy:
    """What `memory=auto` stands for under a limit. Peaks in GiB, of the fullest rank."""

    limit_gib: float
    kept_gib: float  # forecast of the run that keeps everything
    kept_seconds: float
    peak_gib: float  # forecast with `choices`
    step_seconds: float
    choices: list[Choice]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def table(self) -> str:
        """The choices as people read them."""
        head = f"memory.limit_gib={self.limit_gib:g}: memory=auto plans {self.peak_gib:.2f} GiB, "
        if not self.choices:
            return head + f"everything kept (up to {MARGIN:.0%} more would still be below)"
        more = self.step_seconds / self.kept_seconds - 1
        head += f"{self.kept_gib:.2f} with everything kept, and {more:+.1%} seconds per step"
        rows = [("module", "is", "releases GiB", "adds seconds")]
        rows += [
            (each.module, _DONE[each.way], f"{each.released_gib:.3f}", f"{each.added_seconds:.4f}")
            for each in self.choices
        ]
        lines = [f"  {a:<15} {b:<11} {c:>12} {d:>13}" for a, b, c, d in rows]
        return "\n".join([head, *lines])


class _Cost(NamedTuple):
    peak_gib: float
    step_seconds: float


def settle(config: Config) -> tuple[Config, Policy | None]:
    """The configuration with the modules that `memory=auto` chooses in place of `auto`; as it is,
    and None, where it does not say `auto`. It must have no violations.

    The module that costs the fewest seconds per byte is taken first, then the next beside it, until
    the forecast is below the limit by `MARGIN`; those that turn out not to be needed are given up
    again, the most costly first. Where modules are not enough, whole layers are recomputed.

    Raises:
        ConfigError: no policy stays below the limit; or there is no forecast.
    """
    limit = config.memory.limit_gib
    if config.memory.recompute_granularity != "auto" or limit is None:
        return config, None
    costs = _Costs(config)
    kept, room = costs.of([]), limit / (1 + MARGIN)
    found = _greedy(costs, room)
    least = costs.of(found).peak_gib
    if least <= room:
        found = _needed(costs, found, room)
        return _treated(config, found), _policy(costs, limit, found)
    whole = replace(config, memory=replace(_plain(config), recompute_granularity="full"))
    cost = _cost(whole)
    if cost.peak_gib <= room:
        released, added = kept.peak_gib - cost.peak_gib, cost.step_seconds - kept.step_seconds
        choices = [Choice(WHOLE, "recompute", released, added)]
        return whole, Policy(limit, *kept, *cost, choices)
    least = min(least, cost.peak_gib) * (1 + MARGIN)
    reason = "whatever is recomputed or swapped, the least that this run can promise to stay below "
    reason += f"is {least + 0.005:.2f} GiB"
    hint = f"memory.limit_gib={least + 0.005:.2f}"
    raise ConfigError([Violation("memory.limit_gib", limit, reason, hint)])


class _Costs:
    """What a configuration costs with modules recomputed or swapped, each set forecast once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._known: dict[frozenset[Treated], _Cost] = {}

    def of(self, modules: list[Treated]) -> _Cost:
        key = frozenset(modules)
        if key not in self._known:
            self._known[key] = _cost(_treated(self.config, modules))
        return self._known[key]

    def works(self, modules: list[Treated]) -> bool:
        """Whether they can be so side by side."""
        treated = _treated(self.config, modules)
        return not [*memory_rules(treated), *swap_limits(treated)]


def _cost(config: Config) -> _Cost:
    found = predict(config)
    return _Cost(found.peak_memory_gib, found.step_seconds)


def _plain(config: Config) -> MemoryConfig:
    return replace(config.memory, recompute_granularity="none", swap=[], limit_gib=None)


def _treated(config: Config, modules: list[Treated]) -> Config:
    """The configuration with the modules recomputed or swapped, all others kept."""
    again = [module for module, way in modules if way == "recompute"]
    memory = replace(_plain(config), swap=[module for module, way in modules if way == "swap"])
    if again:
        memory = replace(memory, recompute_granularity="selective", recompute_modules=again)
    return replace(config, memory=memory)


def _greedy(costs: _Costs, room: float) -> list[Treated]:
    """Modules in the order of what a byte of theirs costs beside those taken before, until the peak
    fits `room`."""
    found: list[Treated] = []
    # What a module costs rises with what is taken before it (the way to the host fills up), so that
    # what it cost last is the least that it costs now.
    queue = sorted(filter(None, (_worth(costs, found, each) for each in _treatments(costs))))
    while queue and costs.of(found).peak_gib > room:
        candidate = queue.pop(0).candidate
        now = _worth(costs, found, candidate)
        if now and queue and now.price > queue[0].price:
            insort(queue, now)
        elif now:
            found = _with(costs, found, candidate)
    return found


def _treatments(costs: _Costs) -> Iterator[Treated]:
    for module in get_args(RecomputeModule):
        for way in get_args(Way):
            if costs.works([(module, way)]):
                yield module, way


class _Worth(NamedTuple):
    price: float  # part of a step for each GiB
    released_negative: float  # where several cost nothing, those that release most come first
    candidate: Treated


def _worth(costs: _Costs, found: list[Treated], candidate: Treated) -> _Worth | None:
    """What it is worth to treat one more module; None where that cannot be, or releases nothing."""
    wider = _with(costs, found, candidate)
    if not costs.works(wider):
        return None
    before = costs.of(found)
    try:
        now = costs.of(wider)
    except ConfigError:
        return None  # nobody knows how fast the machine reaches its host
    released = before.peak_gib - now.peak_gib
    if released <= 0:
        return None
    price = max(now.step_seconds / before.step_seconds - 1, 0.0) / released
    return _Worth(round(price, 9), -released, candidate)


def _with(costs: _Costs, found: list[Treated], candidate: Treated) -> list[Treated]:
    """`found` and one more, which takes the place of its parts and of what cannot be beside it."""
    return [*(each for each in found if costs.works([each, candidate])), candidate]


def _needed(costs: _Costs, found: list[Treated], room: float) -> list[Treated]:
    """`found` without those that the limit does not need, the last, most costly, given up first."""
    for candidate in reversed(found):
        fewer = [each for each in found if each != candidate]
        if costs.of(fewer).peak_gib <= room:
            found = fewer
    return found


def _policy(costs: _Costs, limit: float, modules: list[Treated]) -> Policy:
    choices, kept = [], costs.of([])
    before = kept
    for count, (module, way) in enumerate(modules, 1):
        now = costs.of(modules[:count])
        released, added = before.peak_gib - now.peak_gib, now.step_seconds - before.step_seconds
        choices.append(Choice(module, way, released, added))
        before = now
    return Policy(limit, *kept, *before, choices)
