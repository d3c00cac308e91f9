"""A mark for tests that need a cluster."""

import os

import pytest

from .network import obstacle

_OBSTACLE = obstacle()
needs_cluster = pytest.mark.skipif(
    bool(_OBSTACLE) and "CI" not in os.environ,  # a check that CI leaves out is none
    reason=_OBSTACLE or "-",
)
