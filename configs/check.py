"""Every way in which a configuration cannot work, at once, with values that would.

`violations` serves the trainer, the simulator and `python -m pangu.doctor`; the rules themselves
are in `configs.shape_rules`, `layout_rules`, `run_rules` and `engine_rules`. A rule yields a
`Problem` with values that might work in its place; here they are tried, and those that do shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from configs.compose import compose_dict, from_dict
from configs.engine_rules import engine
from configs.layout import num_virtual_stages
from configs.layout_rules import batch, pipeline, ranks, sequence, widths
from configs.problem import EP, Problem, get, with_value
from configs.run_rules import bounds, data, memory, optimizer, profile, trainer_limits
from configs.schema import Config
from configs.shape_rules import adapters, attention, experts, leap_heads, patches
from configs.violation import ConfigError, Violation

Purpose = Literal["train", "plan"]


@dataclass(frozen=True)
class Started:
    """What a launcher has started: `processes` in all, `per_node` of them on this one. It says so
    in the environment `variable`; `option` of its command line sets it."""

    processes: int
    per_node: int
    variable: str
    option: str


_TRIED = 32  # values of one key, which all rules are asked about
RULES = (
    attention,
    experts,
    patches,
    adapters,
    leap_heads,
    ranks,
    widths,
    pipeline,
    sequence,
    batch,
    memory,
    optimizer,
    data,
)


def violations(
    config: Config, *, purpose: Purpose = "train", started: Started | None = None
) -> list[Violation]:
    """Everything that keeps this configuration from running, each with values that would work.

    Args:
        purpose: `train` also refuses what only the simulator can plan.
        started: whose words stand in the place of `devices`.
    """
    problems = _problems(config, purpose)
    rules = {problem.rule for problem in problems}
    is_named = {"devices": started.variable} if started else {}
    is_set = {"devices": started.option} if started else {}
    return [
        Violation(
            is_named.get(problem.key, problem.key),
            problem.value,
            problem.reason,
            _suggestion(config, purpose, problem, rules, is_set),
        )
        for problem in problems
    ]


def warnings(config: Config) -> list[Violation]:
    """What runs, but perhaps not as intended."""
    return list(_warnings(config))


def load_checked(
    overrides: list[str],
    *,
    purpose: Purpose = "train",
    alone: bool = False,
) -> Config:
    """Compose, type and check a configuration.

    Raises:
        ConfigError: with everything wrong with it; see `examine`.
    """
    config, found = examine(overrides, purpose=purpose, alone=alone)
    if config is None or found:
        raise ConfigError(found)
    return config


def examine(
    overrides: list[str],
    *,
    purpose: Purpose = "train",
    started: Started | None = None,
    alone: bool = False,
) -> tuple[Config | None, list[Violation]]:
    """The configuration, where one can be made, and everything wrong with it.

    Overrides that cannot be read are left out when the rest is checked.

    Args:
        started: by a launcher; becomes `devices` and `launch`.
        alone: no launcher, so that this machine's processes are all there is.
    """
    found: list[Violation] = []
    try:
        tree = compose_dict(overrides)
    except ConfigError as error:
        found += error.violations
        try:
            tree = compose_dict([line for line in overrides if _composes(line)])
        except ConfigError:
            return None, found
    try:
        config = from_dict(tree)
    except ConfigError as error:
        found += error.violations
        for violation in error.violations:
            _forget(tree, violation.key.split("."))
        try:
            config = from_dict(tree)
        except ConfigError:
            return None, found
    if started and config.devices not in (None, started.processes):
        reason = f"{started.variable}={started.processes}: so many processes were started"
        hint = f"devices={started.processes} or null; or {started.option}={config.devices}"
        found.append(Violation("devices", config.devices, reason, hint))
    if started:
        nodes = max(started.processes // started.per_node, 1)
        launch = replace(config.launch, processes=started.per_node, nodes=nodes)
        config = replace(config, devices=started.processes, launch=launch)
    if alone:
        found += _alone(config)
    named = {violation.key for violation in found}
    left = violations(config, purpose=purpose, started=started)
    found += [violation for violation in left if violation.key not in named]
    return config, found


def _alone(config: Config) -> Iterator[Violation]:
    launch = config.launch
    if launch.nodes > 1:
        reason = "python -m pangu.train alone starts the processes of one node"
        hint = "a launcher on every node (see launch/), or launch.nodes=1"
        yield Violation("launch.nodes", launch.nodes, reason, hint)
    elif config.devices not in (None, launch.processes):
        reason = f"{launch.processes} processes start on this machine"
        hint = f"launch.processes={config.devices}, devices=null, or a launcher (see launch/)"
        yield Violation("devices", config.devices, reason, hint)


def _composes(override: str) -> bool:
    try:
        compose_dict([override])
    except ConfigError:
        return False
    return True


def _forget(tree: dict[str, Any], path: list[str]) -> None:
    """Drop a key, or the whole list that it is in, so that its default takes its place."""
    node: Any = tree
    for part, inner in zip(path, [*path[1:], ""], strict=True):
        child = node.get(part) if isinstance(node, dict) else None
        if isinstance(child, dict) and inner in child:
            node = child
        else:
            node.pop(part, None)
            return


def _problems(config: Config, purpose: Purpose) -> list[Problem]:
    config, found = bounds(config)  # with which the other rules can divide
    broken = {problem.key for problem in found}
    for rule in (*RULES, trainer_limits, engine, profile) if purpose == "train" else RULES:
        found += [problem for problem in rule(config) if problem.key not in broken]
    return found


def _suggestion(
    config: Config, purpose: Purpose, problem: Problem, rules: set[str], is_set: Mapping[str, str]
) -> str:
    """The candidates that mend this problem and leave the fewest, rather none that is new."""
    mending: list[tuple[int, bool, str, Any]] = []
    for key, values in problem.candidates.items():
        for value in _nearest(list(values), get(config, key), _TRIED):
            left = {p.rule for p in _problems(with_value(config, key, value), purpose)}
            if problem.rule not in left:
                mending.append((len(left), not left <= rules, key, value))
    best = min((entry[:2] for entry in mending), default=None)
    parts = []
    for key in problem.candidates:
        working = [value for *score, name, value in mending if name == key and (*score,) == best]
        if working:
            values = _listed(_nearest(working, problem.value))
            parts.append(f"{is_set.get(key, key)}={values}")
    return "; or ".join([*parts, problem.hint] if problem.hint else parts)


def _nearest(values: list[Any], wanted: Any, count: int = 6) -> list[Any]:
    """The `count` values nearest to the one that failed, in their own order."""
    if len(values) <= count or not isinstance(wanted, int):
        return values[:count]
    nearest = sorted(values, key=lambda value: abs(value - wanted))[:count]
    return [value for value in values if value in nearest]


def _listed(values: list[Any]) -> str:
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _warnings(config: Config) -> Iterator[Violation]:
    model, moe, parallel, train = config.model, config.moe, config.parallel, config.train
    if model.num_experts and moe.router == "expert_choice":
        reason = "experts look at the whole sequence: not causal, so the loss of a language model "
        reason += "is not one it could reach when generating"
        yield Violation("moe.router", moe.router, reason, "moe=moge or moe=top_k")
    if model.num_experts and moe.router == "forced_balance":
        yield Violation("moe.router", moe.router, "tokens are dealt out in turn: benchmarks only")
    if model.num_experts and moe.router == "moge":
        if moe.num_expert_groups == 1:
            key, reason = "moe.num_expert_groups", "one group: the choice is that of plain top-k"
            yield Violation(key, 1, reason)
        if moe.num_expert_groups % parallel.expert_model_parallel_size:
            reason = f"ranks share the {moe.num_expert_groups} groups unevenly, so that device "
            reason += "loads differ and the dispatcher has to exchange counts"
            yield Violation(EP, parallel.expert_model_parallel_size, reason)
    if config.backend.name == "cpu" and config.backend.precision == "bf16":
        reason = "about 14 times slower than fp32 on CPUs without bfloat16 instructions"
        yield Violation("backend.precision", "bf16", reason, "backend.precision=fp32")
    longest = max([train.seq_length, *(p.seq_length or 0 for p in config.optimizer.phases)])
    if model.position_embedding == "rope" and longest > model.max_position_embeddings:
        reason = f"longer than the {model.max_position_embeddings} positions the model is meant for"
        yield Violation("train.seq_length", longest, reason)
    if not config.optimizer.phases and config.optimizer.warmup_steps >= train.steps:
        reason = f"the rate is still rising when the run ends at step {train.steps}"
        yield Violation("optimizer.warmup_steps", config.optimizer.warmup_steps, reason)
    planned = sum(phase.steps for phase in config.optimizer.phases)
    if planned > train.steps:
        reason = f"the run ends before its phases do, after {planned} steps"
        yield Violation("train.steps", train.steps, reason)
    stages = num_virtual_stages(config)
    if parallel.num_noop_layers >= stages:
        reason = f"more no-op layers than {stages} stages need to be filled"
        yield Violation("parallel.num_noop_layers", parallel.num_noop_layers, reason)
