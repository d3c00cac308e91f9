"""Decoding in which every sum of a row is made in one order, whatever else is in the pass: a
sequence's tokens then depend on neither its neighbours nor chunks, in any precision."""

from __future__ import annotations

from dataclasses import replace

import torch

from pangu import backends
from pangu.ops.attention import attention_fixed, attention_reference
from pangu.ops.cases import TOLERANCES
from pangu.ops.grouped_matmul import Fixed, Loop
from pangu.ops.matmul import products_in_one_order

_HELD: list[torch.library.Library] = []  # for as long as the process lives


def decode_in_one_order() -> str:
    """From now on, in this process. A line to say where nothing had to change, else nothing.

    Raises:
        ValueError: this device has no such operators, or they fail their trial.
    """
    backend = backends.current()
    if backend.in_one_order is None:
        raise ValueError(
            f"{backend.description} has no kernels for it: they are for NVIDIA GPUs of compute "
            "capability 8.0 and more, with Triton and a C compiler"
        )
    if not backend.in_one_order:
        return "batch_invariant: on this device, tokens never depend on neighbours with float32"
    if fault := _fault(backend.device):
        raise ValueError(f"its kernels fail their trial on {backend.description}: {fault}")
    backends.use(replace(backend.operators, **backend.in_one_order))
    _HELD.append(products_in_one_order(backend.device))
    return ""


def _fault(device: torch.device) -> str:
    """What is wrong with the kernels there, on which nobody may have run them: they against
    references on the host, and a row by itself against the same row among others."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([5, 0, 19])
    for dtype, tolerance in TOLERANCES.items():
        x, w, query, key = (
            torch.randn(*shape, generator=generator).to(dtype)
            for shape in ((24, 96), (3, 96, 80), (5, 1, 4, 64), (70, 1, 2, 64))
        )
        try:
            there, weights, q, k = (each.to(device) for each in (x, w, query, key))
            product = Fixed.rows(there, weights, counts)
            alone = Fixed.rows(there[-1:], weights, torch.tensor([0, 0, 1]))
            attended = attention_fixed(q, k, k, scale=0.125)
        except Exception as error:  # a compiler's, a driver's: whatever it is, it is the answer
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        x, w, q, k = (each.double() for each in (x, w, query, key))
        expected = Loop.rows(x, w, counts), attention_reference(q, k, k, scale=0.125)
        for found, true in zip((product, attended), expected, strict=True):
            if not (found.cpu().double() - true).abs().max() <= tolerance * true.abs().max():
                return f"results in {dtype} are wrong"
        if not torch.equal(alone[0], product[-1]):
            return "a row depends on others"
    return ""
