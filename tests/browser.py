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


def drawn(page: Path | str, profile: Path, *more: str) -> str:
    """The document of `page`, a file or an address, serialised; `profile` is an own, new folder for
    the browser, `more` are flags."""
    flags = ["--headless", "--no-sandbox", "--no-first-run", f"--user-data-dir={profile}"]
    flags += [f"--disable-{name}" for name in _QUIET]
    address = page.as_uri() if isinstance(page, Path) else page
    flags += ["--virtual-time-budget=4000", *more]
    command = [str(_CHROMIUM), *flags, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
