"""The configuration tree: YAML files and the dataclasses that describe them."""

from pathlib import Path

FOLDER = Path(__file__).parent  # of the YAML files


def groups() -> dict[str, list[str]]:
    """The configuration groups and their options."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(FOLDER.iterdir())
        if folder.is_dir() and not folder.name.startswith("_")
    }
