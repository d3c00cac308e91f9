"""From command-line overrides to a typed `Config`, with every mistake named.

Hydra composes the YAML groups; pydantic checks names and types of all keys at once.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from configs import FOLDER, groups, yaml_file
from configs.schema import Config
from configs.violation import ConfigError, Violation

# Keys that were, and where what they said is said now.
MOVED = {
    "simulation.dispatch": "moe.dispatcher=alltoall, hierarchical or deduplicated"
    " (as DeepEP with simulation.node_forwarding=true)",
    "simulation.swap_modules": "memory.swap",
    "simulation.swap_optimizer": "memory.swap_optimizer",
    "inference.input_length": "inference.prompt_length",
    "inference.output_length": "inference.max_new_tokens",
}


def _ranks_left(most: int, processes: int, nodes: int, *taken: int) -> int:
    """The largest divisor of `most` that fits into the ranks which other sizes leave."""
    return math.gcd(most, processes * nodes // (math.prod(taken) or 1)) or 1


OmegaConf.register_new_resolver("ranks_left", _ranks_left, replace=True)


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config, config=None)


def compose_dict(overrides: list[str], primary: str = "config") -> dict[str, Any]:
    """The composed tree as plain dictionaries.

    Raises:
        ConfigError: naming every override that cannot be read or whose group has no such option.
    """
    violations, parsed = _parse(overrides)
    if experiment := _experiment_file(parsed):
        others = [str(o.input_line) for o in parsed if o.key_or_group != "experiment"]
        return compose_dict([*experiment, *others], primary)
    parsed, machine = _machine_file(parsed)
    known = groups()
    for override in parsed:
        if wrong := _unusable(override, known):
            violations.append(wrong)
    if violations:
        raise ConfigError(violations)
    # `++` lets an unknown key through to pydantic, which reports all of them together.
    lines = [
        str(override.input_line)
        if override.key_or_group in known or str(override.input_line)[0] in "+~"
        else f"++{override.input_line}"
        for override in parsed
    ]
    try:
        with initialize_config_dir(str(FOLDER), version_base="1.3"):
            tree = OmegaConf.to_container(compose(primary, overrides=lines), resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Violation("configuration", " ".join(overrides), reason)]) from error
    assert isinstance(tree, dict)
    if machine:
        tree["hardware"] = machine | (tree.get("hardware") or {})
    return tree  # type: ignore[return-value]


def _unusable(override: Override, known: dict[str, list[str]]) -> Violation | None:
    """What Hydra would refuse in words of its own: lists to sweep over, and unknown options."""
    name, option = override.key_or_group, override.value()
    typed = str(override.input_line).partition("=")[2]
    if override.is_sweep_override():
        reason = "several values, where a single run has one"
        return Violation(name, typed, reason, "one of them; pangu.train -m runs each in turn")
    if name not in known or override.is_delete() or option in known[name]:
        return None
    hint = f"one of {', '.join(known[name])}"
    if isinstance(option, str | None):
        return Violation(name, typed, f"there is no file configs/{name}/{typed}.yaml", hint)
    return Violation(name, typed, f"{name} is a group of keys", f"{hint}; or {name}.KEY=VALUE")


def _machine_file(parsed: list[Override]) -> tuple[list[Override], dict[str, Any]]:
    """Takes `hardware=FILE.yaml` (what calibration wrote) out of the overrides, and reads it."""
    machine: dict[str, Any] = {}
    others = []
    for override in parsed:
        value = str(override.value())
        if override.key_or_group != "hardware" or not value.endswith((".yaml", ".yml")):
            others.append(override)
            continue
        machine = yaml_file.read(value, "hardware")
        if not machine:
            raise ConfigError([Violation("hardware", value, "holds no figures")])
    return others, machine


def _experiment_file(parsed: list[Override]) -> list[str]:
    """What `experiment=FILE.yaml` (what the simulator's search wrote) overrides, line by line."""
    files = [str(o.value()) for o in parsed if o.key_or_group == "experiment"]
    if not files or not files[-1].endswith((".yaml", ".yml")):
        return []
    tree = yaml_file.read(files[-1], "experiment")
    if not tree:
        raise ConfigError([Violation("experiment", files[-1], "overrides nothing")])
    lines = _defaults(tree.pop("defaults", []), files[-1])
    return lines + [f"++{key}={_grammar(value)}" for key, value in _leaves(tree)]


def _defaults(listed: Any, file: str) -> list[str]:
    """The options of groups that an experiment chooses, as overrides."""
    items = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(item, dict) for item in items):
        reason = "its defaults are no list of `override /GROUP: OPTION`"
        raise ConfigError([Violation("experiment", file, reason)])
    chosen = [(str(g).removeprefix("override /"), o) for item in items for g, o in item.items()]
    if any(group == "experiment" for group, _ in chosen):
        raise ConfigError([Violation("experiment", file, "it names an experiment in turn")])
    return [f"{group}={option}" for group, option in chosen]


def _leaves(tree: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        leaves += _leaves(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return leaves


def _grammar(value: Any) -> str:
    """A value as the override grammar writes it."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ",".join(map(_grammar, value)) + "]"
    if isinstance(value, dict):  # the grammar knows no quotes around a key
        return "{" + ",".join(f"{key}:{_grammar(item)}" for key, item in value.items()) + "}"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _parse(overrides: list[str]) -> tuple[list[Violation], list[Override]]:
    parser = OverridesParser.create()
    violations, parsed = [], []
    for line in overrides:
        key, equals, value = line.partition("=")
        readable = [line]
        if value and value[0] not in "[{(":  # a path with letters that the grammar does not know
            readable.append(f"{key}={_grammar(value)}")
        for text in readable:
            try:
                parsed.append(parser.parse_override(text))
                break
            except (HydraException, ValueError, RecursionError) as error:
                reason = (str(error).splitlines() or ["cannot be read"])[0]
        else:
            plain = equals and re.fullmatch(r"[\w.+~/@]+", key)
            if not plain:
                key, value, reason = line, "", "is not of the form key=value"
            hint = "quotes around what is neither a word nor a number" if plain else "key=value"
            violations.append(Violation(key, value, reason, hint))
    return violations, parsed


def from_dict(tree: dict[str, Any]) -> Config:
    """A typed `Config` from plain dictionaries.

    Raises:
        ConfigError: naming every unknown key and every value of a wrong type.
    """
    try:
        return _adapter().validate_python(tree, extra="forbid")
    except ValidationError as error:
        raise ConfigError([_from_pydantic(item) for item in error.errors()]) from None


def _from_pydantic(item: Any) -> Violation:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        if key in MOVED:
            return Violation(key, item["input"], "is another key now", MOVED[key])
        siblings = list(_schema_of(path[:-1]).get("properties", {}))
        close = difflib.get_close_matches(path[-1], siblings, n=3, cutoff=0.5)
        suggestion = (
            f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(siblings)}"
        )
        return Violation(key, item["input"], "unknown key", suggestion)
    if item["type"] == "missing":
        return Violation(key, "", "is missing", f"{key}=VALUE: {_expected(_schema_of(path))}")
    schema = _schema_of(path)
    if members := schema.get("properties"):
        hint = f"{key}.KEY=VALUE, of {', '.join(members)}"
        return Violation(key, item.get("input"), "is a group of keys, not a value", hint)
    if key == "parallel.schedule" and item["input"] == "1f1b_overlap":
        hint = "parallel.overlap_expert_parallel=true"
        return Violation(key, item["input"], "is a key of its own now", hint)
    reason = "unknown value" if "enum" in schema else item["msg"].lower()
    return Violation(key, item.get("input"), reason, _expected(schema))


def _expected(schema: dict[str, Any]) -> str:
    """What may be written where a JSON schema is to be met, with the default as an example."""
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list: [a, b]",
        "object": "a mapping: {a: 1, b: 2}",
        "null": "null",
    }
    kinds = [one.get("type") for one in schema.get("anyOf", [schema])]
    text = " or ".join(words[kind] for kind in kinds if kind in words)
    default = schema.get("default")
    shown = text and isinstance(default, int | float) and not isinstance(default, bool)
    return f"{text}; the default is {default:g}" if shown else text


def _schema_of(path: list[str]) -> dict[str, Any]:
    """The JSON schema of a key; {} for one that there is not."""
    schema: Any = _adapter().json_schema()
    definitions = schema.get("$defs", {})
    for part in path:
        inner = schema.get("properties", {}).get(part) or schema.get("items")
        schema = inner or schema.get("additionalProperties") or {}
        if schema is True:  # whatever it may be
            return {}
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def load(overrides: list[str]) -> Config:
    """Compose and type a configuration.

    Raises:
        ConfigError: with every unknown key, unknown option and wrong type.
    """
    return from_dict(compose_dict(overrides))


def read_file(file: Path, key: str) -> Config:
    """The configuration that `to_yaml` wrote.

    Raises:
        ConfigError: under `key`, for a file that cannot be read, or is of another version.
    """
    tree = yaml_file.read(file, key)
    for old in MOVED:  # of runs before: the simulator's, of which no weight and no token knows
        section, _, name = old.partition(".")
        if isinstance(tree.get(section), dict):
            tree[section].pop(name, None)
    try:
        return from_dict(tree)
    except ConfigError as error:
        reason = f"cannot be read: {' '.join(str(error).split())}"
        raise ConfigError([Violation(key, file, reason)]) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration, as written into the run folder; see `read_file`."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
