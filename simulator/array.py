"""What a count or a time is: of one layout a number, of many an array. Everything broadcasts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = float | NDArray[Any]
Mask: TypeAlias = bool | NDArray[np.bool_]
