"""What `test_examples` runs on a tree with the diffs of docs/architecture.md in it."""

from dataclasses import replace

import gloo
import layers
import numpy as np
import pytest
import torch

from configs.check import load_checked
from configs.dispatch import dispatcher
from configs.schema import ParallelConfig
from pangu import backends
from pangu.moe.routing import routing_for
from simulator.api import count_parameters, predict

SIZES = ["model=mixtral_8x22b", "hardware=h20", "devices=128", "memory=full"]
SIZES += ["parallel.pipeline_model_parallel_size=8", "parallel.expert_model_parallel_size=8"]
SIZES += ["train.global_batch_size=128", "train.seq_length=4096"]


def model_on_the_machine() -> None:
    """Its published 141 B parameters, 39 B active; the dispatcher sends what all-to-all does."""
    plan = load_checked(SIZES)
    count = count_parameters(plan)
    assert (round(count.total / 1e9), round(count.active / 1e9)) == (141, 39)
    flat, packed = (
        predict(replace(plan, moe=replace(plan.moe, dispatcher=way)))
        for way in ("alltoall", "packed")
    )
    assert flat.fits
    assert packed.step_seconds == flat.step_seconds


def router() -> None:
    """As many for each token, and experts far more alike than the logits would have them."""
    config = load_checked(["moe=sinkhorn"])
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(512, 16, generator=generator) + torch.linspace(0, 3, 16)
    weights, chosen = routing_for(config.moe)(logits)
    plain = routing_for(replace(config.moe, router="top_k"))(logits)[1]
    assert (chosen.sum(1) == config.moe.top_k).all()
    assert ((weights > 0) == chosen).all()
    spread = [float(np.std(each.sum(0).numpy())) for each in (chosen, plain)]
    assert spread[0] < 0.2 * spread[1], spread


def dispatcher_of_one_rank() -> None:
    """The layer with it is the plain one; what it cannot serve is refused."""
    moe = replace(layers.TOP_K, dispatcher="packed")
    gloo.single()
    tokens = torch.randn(5, 2, layers.HIDDEN, dtype=torch.float64)
    found = layers.build(moe, ParallelConfig())(tokens)[0]
    expected = layers.reference(tokens.flatten(0, 1), layers.full_weights(), moe)
    assert torch.allclose(found.flatten(0, 1), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="ETP ranks do not cut"):
        dispatcher(moe, 2, 2)


def backend() -> None:
    """Not here: it says so."""
    assert backends.resolve("xpu") == "xpu"
    with pytest.raises(RuntimeError, match="needs an XPU, torch sees 0"):
        backends.importlib.import_module("pangu.backends.xpu").create(0)


if __name__ == "__main__":
    model_on_the_machine()
    backends.select("cpu")
    router()
    dispatcher_of_one_rank()
    backend()
