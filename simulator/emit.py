"""A recommended layout as an experiment for `pangu.train` and `pangu.doctor`."""

from __future__ import annotations

from typing import Any

import yaml

from configs import groups
from configs.schema import Config, ParallelConfig

DECIDED = ("parallel", "memory")  # groups that a search decides on


def experiment(config: Config, overrides: list[str]) -> str:
    """YAML of an experiment: the user's own overrides, then what the search has decided."""
    known = groups()
    chosen: list[dict[str, str]] = []
    tree: dict[str, Any] = {}
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key in known and not value.endswith((".yaml", ".yml")):
            if key not in DECIDED:
                chosen.append({f"override /{key}": value})
        elif key in known:
            tree["hardware"] = config.hardware
        elif key.split(".")[0] not in DECIDED:
            _put(tree, key.split("."), yaml.safe_load(value))
    tree["devices"] = config.world_size
    tree["parallel"] = _parallel(config.parallel)
    tree["memory"] = vars(config.memory)
    tree.setdefault("train", {})
    tree["train"]["micro_batch_size"] = config.train.micro_batch_size
    tree["train"]["global_batch_size"] = config.train.global_batch_size
    tree["train"]["seq_length"] = config.train.seq_length
    head = "# @package _global_\n# Written by `python -m simulator search`.\n"
    if chosen:
        head += yaml.safe_dump({"defaults": chosen}, sort_keys=False)
    return head + yaml.safe_dump(tree, sort_keys=False)


def _parallel(parallel: ParallelConfig) -> dict[str, Any]:
    return dict(vars(parallel))


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
