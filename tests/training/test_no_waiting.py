"""On a GPU a MoGE step's host does not wait for its device, from the first kernel to the last."""

from unittest.mock import patch

import in_interpreter  # noqa: F401 - before any kernel
import pytest
import torch
import waits
from gloo import alone
from layouts import steps

from pangu import backends
from pangu.backends import cuda
from pangu.engines.megatron import engine
from pangu.engines.megatron.fitting import select_backend

SMALL = [
    "experiment=quickstart",
    "model.num_layers=2",
    "model.vocab_size=128",
    "train.seq_length=16",
    "train.global_batch_size=2",
]


def asked(overrides):
    """What the host asks in the second step: inside the passes of its micro-batches, and in all of
    it, until it asks what the step did."""
    inside, after, schedule = [], [], engine.run_schedule

    def passes(*given, **named):
        with waits.noticed() as found:
            result = schedule(*given, **named)
        inside.append(found)
        return result

    def whole(*given, **named):
        with waits.noticed() as found:
            result = step(*given, **named)
        after.append(found)
        return result

    step = engine.MegatronEngine.train_step
    with (
        patch.object(engine, "run_schedule", passes),
        patch.object(engine.MegatronEngine, "train_step", whole),
    ):
        alone(steps, overrides, 1, 2)
    return inside[1], after[1]


@pytest.mark.parametrize("router", ["moge", "top_k"])
def test_nobody_asks_between_the_first_kernel_and_the_loss(router):
    """On the operators that a GPU has; nor afterwards, until it asks what the step did."""
    select_backend("cpu")
    here = backends.current().operators
    backends.use(cuda.OURS)
    try:
        inside, whole = asked([*SMALL, f"moe.router={router}"])
    finally:
        backends.use(here)
    assert inside == []
    assert whole == []


def test_questions_are_noticed():
    x = torch.arange(3)
    with waits.noticed() as found:
        x.sum().item()
        x.nonzero()
        x.tolist()
        x.cpu()
        x.to("cpu")
        torch.tensor([1.0], device="cpu")
        x.to("cpu", non_blocking=True)
        torch.ones(2).sum().to(torch.float64)
    assert [each.rpartition(": ")[2] for each in found] == [
        "_local_scalar_dense",
        "nonzero",
        "tolist",
        "cpu",
        "to",
        "tensor",
    ]
