"""Steps of a model on our Triton kernels, in its interpreter, beside those on plain operators."""

from dataclasses import asdict, replace

import in_interpreter  # noqa: F401 - first
import pytest
from gloo import alone
from layouts import steps

from pangu import backends
from pangu.backends import cuda
from pangu.engines.megatron.fitting import select_backend

MOGE = [
    "experiment=quickstart",
    "model.num_layers=2",
    "model.vocab_size=130",
    "model.sandwich_norm=true",
    "moe.top_k=4",
    "train.seq_length=19",
    "train.global_batch_size=2",
]


def on_kernels(overrides):
    """Two steps with every operator of which there is a kernel run as it, and what was launched."""
    from triton.runtime.interpreter import InterpretedFunction

    here, launched = backends.current(), set()
    ours = {name: kind for name, kind in asdict(cuda.OURS).items() if kind == "triton"}
    run = InterpretedFunction.run

    def noted(kernel, *given, **named):
        launched.add(kernel.fn.__module__.rpartition(".")[2])
        return run(kernel, *given, **named)

    backends.use(replace(here.operators, **ours))
    InterpretedFunction.run = noted
    try:
        return alone(steps, overrides, 1, 2), launched
    finally:
        InterpretedFunction.run = run
        backends.use(here.operators)


def test_steps_are_those_of_plain_operators():
    select_backend("cpu")
    found, launched = on_kernels(MOGE)
    expected = alone(steps, MOGE, 1, 2)
    for ours, plain in zip(found, expected, strict=True):
        assert ours == pytest.approx(plain, rel=2e-6)
    assert launched == {name for name, kind in asdict(cuda.OURS).items() if kind == "triton"}
