"""Steps of a model on our Triton kernels, in its interpreter, beside those on plain operators."""

from dataclasses import asdict, replace

import in_interpreter  # noqa: F401 - first
import pytest
from gloo import alone, run
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
    "train.seq_length=18",
    "train.global_batch_size=2",
]


SPLIT = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


def on_kernels(overrides, world_size):
    """Two steps with every operator of which there is a kernel run as it, and what was launched."""
    from triton.runtime.interpreter import InterpretedFunction

    here, launched = backends.current(), set()
    ours = {name: kind for name, kind in asdict(cuda.OURS).items() if kind == "triton"}
    launch = InterpretedFunction.run

    def noted(kernel, *given, **named):
        launched.add(kernel.fn.__module__.rpartition(".")[2])
        return launch(kernel, *given, **named)

    backends.use(replace(here.operators, **ours))
    InterpretedFunction.run = noted
    try:
        return steps(overrides, world_size, 2), launched
    finally:
        InterpretedFunction.run = launch
        backends.use(here.operators)


@pytest.mark.distributed
def test_steps_are_those_of_plain_operators():
    """Alone, and with the vocabulary and the experts on two ranks."""
    select_backend("cpu")
    expected = alone(steps, MOGE, 1, 2)
    split = run(2, on_kernels, [*MOGE, *SPLIT], 2)
    for found, launched in (alone(on_kernels, MOGE, 1), *split):
        for ours, plain in zip(found, expected, strict=True):
            assert ours == pytest.approx(plain, rel=2e-6)
        assert launched == {name for name, kind in asdict(cuda.OURS).items() if kind == "triton"}
