"""Imported by the process that `gloo.run` forks its ranks from."""

import warnings

from pangu.engines.megatron.fitting import select_backend

warnings.filterwarnings("ignore")
select_backend("cpu")

import pangu.engines.megatron.engine  # noqa: E402, F401 - after its device is chosen
