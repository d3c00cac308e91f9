"""A user's YAML file as plain values, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.violation import ConfigError, Violation

LARGEST = 1 << 20  # bytes
DEEPEST = 50  # levels


def read(path: str | Path, key: str) -> dict[str, Any]:
    """A mapping from names to values; interpolations are resolved.

    Raises:
        ConfigError: under `key`, for what is no file, no YAML, no mapping, larger than `LARGEST`,
            nested more than `DEEPEST` levels, or made of aliases (which may hold themselves).
    """
    try:
        text = _text(Path(path))
        _refuse_odd(text)
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        reason = f"cannot be read: {' '.join(str(error).split())[:300]}"
    else:
        if isinstance(tree, dict):
            return {str(name): value for name, value in tree.items()}
        reason = "holds no keys with values"
    raise ConfigError([Violation(key, path, reason)])


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def _refuse_odd(text: str) -> None:
    """What would take forever, or never end, when it becomes values."""
    depth, top = 0, True
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"*{event.anchor} in line {event.start_mark.line + 1}: aliases are not read"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if top and isinstance(event, yaml.NodeEvent):
            top = False
            if not isinstance(event, yaml.MappingStartEvent):
                raise ValueError("it holds no keys with values")
