"""Rows on their way to experts, in fewer bits where `moe.dispatch_dtype` says so. Gradients come
back as they are: what was rounded counts as if it had not been.

Shapes: M rows, H hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from configs.schema import DispatchDtype
from pangu.moe.dispatch.messages import Coming, Way, exchange, gather

INT8_MAX = 127


def exchange_rows(
    group: dist.ProcessGroup, dtype: DispatchDtype, received: list[int], sent: list[int]
) -> Way:
    """Rows that the ranks send this one, `received` of them from each."""
    return _narrow(exchange(group, received, sent), dtype)


def gather_rows(group: dist.ProcessGroup, dtype: DispatchDtype) -> Way:
    """All ranks' rows; as many of each."""
    return _narrow(gather(group), dtype)


def _narrow(way: Way, dtype: DispatchDtype) -> Way:
    """There in `dtype`, and back as it is."""

    def there(rows_MH: torch.Tensor) -> Coming:
        if dtype == "bf16":
            coming = way.there(rows_MH.to(torch.bfloat16))
            return coming._replace(read=lambda: coming.read().to(rows_MH.dtype))
        values, scales = map(way.there, quantise(rows_MH))

        def read() -> torch.Tensor:
            return values.read().to(rows_MH.dtype) * scales.read().to(rows_MH.dtype)

        return Coming((*values.works, *scales.works), (*values.sent, *scales.sent), read)

    return way if dtype == "model" else way._replace(there=there)


def quantise(rows_MH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and each row's scale (float32, `[M, 1]`): its largest value becomes 127. No value is
    farther from its own than half a scale."""
    wide = rows_MH.to(torch.float32)
    scales_M1 = wide.abs().amax(dim=1, keepdim=True) / INT8_MAX
    return (wide / scales_M1.clamp(min=1e-30)).round().to(torch.int8), scales_M1
