"""The wheel's own layout: `configs` and `launch` lie inside `pangu` there.

Others have packages of these names (ROS has a `launch`), and of two in one environment one would
be gone. In the repository, and in an editable installation of it, they stand at the top.
"""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INSIDE = ("configs", "launch")
IMPORT = re.compile(rf"^(\s*from) (?=(?:{'|'.join(INSIDE)})\b)", re.MULTILINE)


class Build(build_py):
    """Imports of what moves are written anew: `from configs.schema` is `from pangu.configs.schema`.
    `tests/test_wheel.py` installs the wheel and finds none of the other form."""

    def build_module(self, module, module_file, package):
        built, copied = super().build_module(module, module_file, package)
        if not self.editable_mode:
            file = Path(built)
            text = file.read_text(encoding="utf-8")
            file.write_text(IMPORT.sub(r"\1 pangu.", text), encoding="utf-8")
        return built, copied


folders = {} if "editable_wheel" in sys.argv else {f"pangu.{name}": name for name in INSIDE}
tops = ["pangu", "simulator"] + ([] if folders else list(INSIDE))
setup(
    packages=[
        *find_packages(include=[f"{top}{inner}" for top in tops for inner in ("", ".*")]),
        *folders,
    ],
    package_dir=folders,
    cmdclass={"build_py": Build},
)
