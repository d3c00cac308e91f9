"""Head and loss chunk by chunk, against the product and torch's cross-entropy over all logits."""

from dataclasses import replace
from itertools import accumulate

import in_interpreter  # noqa: F401 - first
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs import head_chunks
from configs.compose import load
from pangu import backends
from pangu.engines.megatron.fitting import select_backend
from pangu.ops.linear_cross_entropy import (
    linear_cross_entropy_chunks,
    linear_cross_entropy_reference,
)
from simulator.counts.records import shapes
from simulator.counts.vocabulary import head
from simulator.layout import from_config

ROWS, WIDTH, VOCABULARY = 37, 4, 130


@pytest.fixture(params=["blocks", "triton"])
def small_chunks(request, monkeypatch):
    """Eight rows at a time, under either cross-entropy."""
    monkeypatch.setattr(head_chunks, "LEAST_ROWS", 8)
    select_backend("cpu")
    here = backends.current().operators
    backends.use(replace(here, cross_entropy=request.param))
    yield
    backends.use(here)


def given(dtype, rows=ROWS):
    hidden = torch.randn(rows, WIDTH).to(dtype).requires_grad_()
    weight = (3 * torch.randn(VOCABULARY, WIDTH)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (rows,)), torch.randint(0, 3, (rows,)) / 2.0


def results(function, hidden, weight, labels, weights, factor):
    leaves = [each.detach().clone().requires_grad_() for each in (hidden, weight)]
    losses = function(*leaves, labels, weights)
    (losses * weights * factor).sum().backward()
    return losses.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_losses_and_gradients_are_those_of_all_logits(small_chunks, dtype, close, rows):
    inputs = given(dtype, rows)
    found = results(linear_cross_entropy_chunks, *inputs, 0.3)
    wide = [each.detach().double() for each in inputs[:2]]
    expected = results(linear_cross_entropy_reference, *wide, *inputs[2:], 0.3)
    assert head_chunks.head_chunks(rows, WIDTH) == (5 if rows == ROWS else 1)
    for ours, theirs in zip(found, expected, strict=True):
        off = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert off <= close
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        losses = linear_cross_entropy_chunks(*inputs)
    torch.testing.assert_close(losses, found[0], rtol=close, atol=close)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_has_the_size_of_all_logits(monkeypatch):
    select_backend("cpu")
    monkeypatch.setattr(head_chunks, "LEAST_ROWS", 8)
    hidden, weight, labels, weights = given(torch.float32)
    with Largest() as largest:
        (linear_cross_entropy_chunks(hidden, weight, labels, weights) * weights).sum().backward()
    assert largest.elements == 8 * VOCABULARY  # a chunk's; the matrix has half as many


def allocated_bytes(run):
    """The most at once, beyond what was there."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    found, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(found)))


@pytest.mark.parametrize(("rows", "precision"), [(1024, "fp32"), (1024, "bf16"), (200, "bf16")])
def test_the_simulator_counts_what_is_held_at_once(rows, precision):
    """256 rows at a time: 4, or 1."""
    select_backend("cpu")
    sizes = ["model.hidden_size=128", "model.vocab_size=2048", f"train.seq_length={rows}"]
    run = ["experiment=quickstart", "hardware=h200", "devices=1"]
    run += [
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
        f"backend.precision={precision}",
    ]
    config = load([*run, *sizes])
    counted = head(shapes(config, from_config(config))).backward_peak
    dtype = backends.torch_dtype(precision)
    hidden = torch.randn(rows, 128, dtype=dtype, requires_grad=True)
    weight = torch.randn(2048, 128, dtype=dtype, requires_grad=True)
    labels, weights = torch.randint(0, 2048, (rows,)), torch.ones(rows)

    def passes():
        losses = linear_cross_entropy_chunks(hidden, weight, labels, weights)
        (losses * weights).sum().backward()

    assert allocated_bytes(passes) == pytest.approx(float(counted), rel=0.02)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(small_chunks, frozen):
    inputs = list(given(torch.float64))
    expected = results(linear_cross_entropy_reference, *inputs, 1.0)
    inputs[frozen] = inputs[frozen].detach()
    trained = inputs[1 - frozen]
    (linear_cross_entropy_chunks(*inputs) * inputs[3]).sum().backward()
    torch.testing.assert_close(trained.grad, expected[2 - frozen])


def test_other_weights_than_promised_make_nan():
    select_backend("cpu")
    hidden, weight, labels, weights = given(torch.float32)
    other = weights.clone()
    other[torch.nonzero(weights)[0]] += 1e-3
    for used in (other, weights + 1):
        losses = linear_cross_entropy_chunks(hidden, weight, labels, weights)
        found = torch.autograd.grad((losses * used).sum(), (hidden, weight))
        assert all(gradient.isnan().all() for gradient in found)
    losses = linear_cross_entropy_chunks(hidden, weight, labels, weights)
    found = torch.autograd.grad((losses * weights * torch.nan).sum(), (hidden, weight))
    assert all(gradient.isnan().all() for gradient in found)


def test_without_trained_tokens_or_rows_gradients_are_zero(small_chunks):
    hidden, weight, labels, weights = given(torch.float32)
    for rows, used in ((ROWS, weights * 0), (0, weights)):
        part = (hidden.detach()[:rows].requires_grad_(), weight)
        losses = linear_cross_entropy_chunks(*part, labels[:rows], used[:rows])
        assert losses.shape == (rows,)
        for gradient in torch.autograd.grad((losses * used[:rows]).sum(), part):
            assert not gradient.any()
