"""`dependencies.py EXTRA…`: what the project and these extras of it need, a line each.

An image installs them before it gets any of our source, so that a change there is a small layer.
"""

import sys
import tomllib
from pathlib import Path


def dependencies(project: dict, extras: list[str]) -> list[str]:
    """Requirements of `[project]` of pyproject.toml; extras that name our extras are followed."""
    found = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inner = line.removeprefix(f"{project['name']}[").removesuffix("]")
            found += [line] if inner == line else dependencies(project, [inner])
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(dependencies(pyproject["project"], sys.argv[1:])))
