"""A page as Chromium leaves it once its scripts have run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_QUIET = ["gpu", "quic", "background-networking", "component-update", "sync"]
needs_browser = pytest.mark.skipif(
    not _CHROMIUM and "CI" not in os.environ,  # a check that CI leaves out is none
    reason="needs Chromium",
)


def drawn(page: Path, profile: Path) -> str:
    """The document of `page`, serialised; `profile` is an own, new folder for the browser."""
    flags = ["--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={profile}"]
    flags += [f"--disable-{name}" for name in _QUIET]
    command = [str(_CHROMIUM), *flags, "--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
