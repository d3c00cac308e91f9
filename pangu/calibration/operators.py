"""Operators as the trainer runs them, timed on this process's device.

Operands rotate through several buffers, so that none is found in a cache only because the same
product ran just before: in a step, every operator meets its operands for the first time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pangu import backends
from pangu.calibration.samples import Sample, median_seconds
from pangu.ops.attention import attention
from pangu.ops.cross_entropy import cross_entropy
from pangu.ops.grouped_matmul import grouped_matmul
from pangu.ops.linear import linear
from pangu.ops.packed_weights import PAYS, PackedWeights, using
from pangu.ops.rms_norm import rms_norm
from pangu.ops.swiglu import swiglu

# m, n, k of [m, k] x [k, n], on a CPU; accelerators multiply each by WIDER.
PRODUCTS = [
    (64, 64, 64),
    (16, 512, 512),
    (128, 128, 128),
    (128, 512, 256),
    (512, 128, 512),
    (256, 256, 256),
    (2048, 128, 256),
    (512, 768, 256),
    (512, 2048, 64),
    (512, 512, 512),
    (2048, 512, 128),
    (64, 4096, 512),
    (512, 4096, 256),
    (1024, 1024, 1024),
]
# groups, rows of each, n, k
GROUPED = [(8, 64, 256, 256), (8, 256, 256, 128), (32, 128, 128, 256), (4, 512, 512, 256)]
# Rows of products that decoding makes, and their weight; a few experts have one each.
FEW_ROWS = (1, 2, 4, 8, 16, 32, 64)
FEW_ROWS_WEIGHT, FEW_ROWS_EXPERTS = (512, 1024), 8
# batch, heads, KV heads, sequence, head size
ATTENTION = [
    (2, 4, 4, 256, 64),
    (2, 8, 2, 512, 32),
    (1, 4, 2, 512, 128),
    (1, 4, 4, 1024, 64),
    (4, 2, 2, 256, 32),
]
# rows, width of element-wise operators
VECTORS = [(1024, 256), (512, 1024), (2048, 512), (2048, 2048)]
WIDER = 8
ROTATION_BYTES = 64 * 2**20  # of operands that take turns
MOST_TURNS = 16

Plan = list[tuple[str, Callable[[], list[Sample]]]]


def plan(quick: bool) -> Plan:
    """What to measure on this device, in steps for a progress bar."""
    scale = WIDER if backends.current().asynchronous else 1

    def few(shapes: list[Any]) -> list[Any]:
        return shapes[:3] if quick else shapes

    steps: Plan = []
    for m, n, k in few(PRODUCTS):
        size = (m * scale, n * scale, k * scale)
        steps.append((f"product {'x'.join(map(str, size))}", partial(_products, *size)))
    for groups, rows, n, k in few(GROUPED):
        size4 = (groups, rows * scale, n * scale, k * scale)
        steps.append((f"{groups} products", partial(_grouped, *size4)))
    for number in few(list(FEW_ROWS)):
        steps.append((f"product of {number} rows", partial(_few_rows, number)))
    for batch, heads, kv_heads, length, head in few(ATTENTION):
        size5 = (batch, heads * scale, kv_heads * scale, length, head)
        steps.append((f"attention of {length}", partial(_attention, *size5)))
    for rows, width in few(VECTORS):
        size2 = (rows * scale, width * scale)
        steps.append((f"vectors {size2[0]}x{size2[1]}", partial(_vectors, *size2)))
    large = (4 if quick else 32) * scale * 2**20
    steps += [("memory", partial(_copy, large)), ("the host's memory", partial(_host, large))]
    return steps


def _tensor(*shape: int) -> torch.Tensor:
    backend = backends.current()
    dtype = backends.torch_dtype("auto")
    return torch.randn(*shape, device=backend.device, dtype=dtype)


def _turns(bytes: float) -> int:
    return int(max(2, min(MOST_TURNS, ROTATION_BYTES // max(bytes, 1))))


def _rotate(make: Callable[[], Any], bytes: float) -> Iterator[Any]:
    return itertools.cycle([make() for _ in range(_turns(bytes))])


def _time(call: Callable[[], object]) -> float:
    backend = backends.current()
    alone = not backend.asynchronous and torch.get_num_threads() == 1
    # One thread's own time leaves out what other programs take from the processor.
    clock = time.process_time if alone else time.perf_counter
    return median_seconds(call, backend.synchronize, clock)


def _products(m: int, n: int, k: int) -> list[Sample]:
    """A linear layer's three products, the weight's gradient added to the main gradients."""
    element = _tensor(1).element_size()
    turns = _rotate(
        lambda: (_tensor(m, k), _tensor(n, k), _tensor(m, n), _main_gradient(n, k)),
        (m * k + n * k + m * n) * element + 4 * n * k,
    )

    def forward() -> None:
        x, weight, _, _ = next(turns)
        torch.mm(x, weight.t())

    def input_gradient() -> None:
        _, weight, grad, _ = next(turns)
        torch.mm(grad, weight)

    def weight_gradient() -> None:
        x, _, grad, main = next(turns)
        main.add_(torch.mm(grad.t(), x))

    backward = {"m": n, "n": k, "k": m, "weight_gradient": True}
    return [
        Sample("matmul", {"m": m, "n": n, "k": k}, _time(forward)),
        Sample("matmul", {"m": m, "n": k, "k": n}, _time(input_gradient)),
        Sample("matmul", backward, _time(weight_gradient)),
    ]


def _main_gradient(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=backends.current().device, dtype=torch.float32)


def _grouped(groups: int, rows: int, n: int, k: int) -> list[Sample]:
    element = _tensor(1).element_size()
    counts = torch.full((groups,), rows)
    turns = _rotate(
        lambda: (_tensor(groups * rows, k), _tensor(groups, k, n)),
        groups * (rows * k + k * n) * element,
    )

    def forward() -> None:
        x, weights = next(turns)
        grouped_matmul(x, weights, counts)

    shape = {"groups": groups, "m_per_group": rows, "n": n, "k": k}
    return [Sample("grouped_matmul", shape, _time(forward))]


def _few_rows(rows: int) -> list[Sample]:
    """A linear layer and experts whose weights are read for few rows, as a model that decodes has
    them."""
    inputs, outputs = FEW_ROWS_WEIGHT
    counts = torch.full((FEW_ROWS_EXPERTS,), rows)
    weights = _rotate(lambda: _tensor(FEW_ROWS_EXPERTS, inputs, outputs), 2**24)
    linear_weights = _rotate(lambda: _tensor(outputs, inputs), 2**22)
    x, rows_of_all = _tensor(rows, inputs), _tensor(FEW_ROWS_EXPERTS * rows, inputs)

    def one() -> None:
        linear(x, next(linear_weights))

    def several() -> None:
        grouped_matmul(rows_of_all, next(weights), counts)

    with torch.no_grad(), using(PackedWeights(4 * ROTATION_BYTES)):
        for call in (one, several):
            for _ in range(MOST_TURNS * PAYS):  # until weights have their copies
                call()
        alone, grouped = _time(one), _time(several)
    shape = {"rows": rows, "weight_bytes": inputs * outputs * x.element_size()}
    return [
        Sample("few_rows", shape | {"grouped": False}, alone),
        Sample("few_rows", shape | {"grouped": True}, grouped / FEW_ROWS_EXPERTS),
    ]


def _attention(batch: int, heads: int, kv_heads: int, length: int, head: int) -> list[Sample]:
    query, key, value = (
        _tensor(length, batch, count, head).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    grad = _tensor(length, batch, heads, head)

    def forward() -> torch.Tensor:
        return attention(query, key, value, scale=head**-0.5)

    def both() -> None:
        torch.autograd.grad(forward(), (query, key, value), grad)

    first = _time(forward)
    shape = {"batch": batch, "heads": heads, "seq_q": length, "seq_kv": length}
    shape |= {"qk_dim": head, "v_dim": head, "kv_heads": kv_heads}
    return [
        Sample("attention", shape, first),
        Sample("attention", shape | {"backward": True}, max(_time(both) - first, first / 10)),
    ]


def _vectors(rows: int, width: int) -> list[Sample]:
    """What surrounds the products: residual, norm, activation and loss, forward and backward.

    One sample for all of them, in the bytes that the simulator counts for each: the fit wants the
    speed of the mixture, in which a norm counts as a step counts it.
    """
    element = _tensor(1).element_size()
    stream = rows * width * element
    labels = torch.randint(0, width, (rows,), device=backends.current().device)
    weight = torch.ones(width, device=labels.device, dtype=_tensor(1).dtype)
    weight.requires_grad_()
    turns = _rotate(
        lambda: (
            _tensor(rows, width).requires_grad_(),
            _tensor(rows, width),
            _tensor(rows, width),
            _tensor(rows, 2 * width).requires_grad_(),
        ),
        5 * stream,
    )

    def residual() -> None:
        _, x, y, _ = next(turns)
        torch.add(x, y)

    def norm() -> None:
        x, _, grad, _ = next(turns)
        torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grad)

    def activation() -> None:
        _, grad, _, x = next(turns)
        torch.autograd.grad(swiglu(x), x, grad)

    def loss() -> None:
        x, _, _, _ = next(turns)
        torch.autograd.grad(cross_entropy(x, labels).sum(), x)

    calls = {residual: 3.0, norm: 5.0, activation: 8.0, loss: 2.0 + 6.0 / element}
    return [
        Sample("vector", {"bytes": passes * stream}, _time(call)) for call, passes in calls.items()
    ]


def _copy(bytes: int) -> list[Sample]:
    """One array to another, far larger than a cache: the bandwidth of the memory."""
    device = backends.current().device
    source = torch.zeros(bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return [Sample("copy", {"bytes": 2 * bytes}, _time(lambda: target.copy_(source)))]


def _host(bytes: int) -> list[Sample]:
    """To where swap puts things, and back."""
    source = torch.zeros(bytes, dtype=torch.uint8, device=backends.current().device)
    tier = backends.current().host_tier(Path.cwd())
    parcels = [tier.send(source)]

    def out() -> None:
        parcels[0] = tier.send(source)
        parcels[0].wait_until_sent()

    def there_and_back() -> None:
        out()
        parcels[0].arrived()

    away, both = _time(out), _time(there_and_back)
    ways = {"out": away, "back": max(both - away, both / 10)}
    return [Sample("host", {"bytes": bytes, "way": way}, ways[way]) for way in ways]
