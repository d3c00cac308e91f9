"""Expert weights saved in one layout are read in another."""

import tempfile
from pathlib import Path

import gloo
import layers
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from configs.schema import ParallelConfig

LAYOUTS = {"EP2": (1, 2, 1), "ETP2": (2, 1, 2), "DP2": (1, 1, 1)}


def build(layout):
    tensor, expert, expert_tensor = LAYOUTS[layout]
    sizes = {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }
    gloo.parallel(**sizes)
    return layers.build(layers.MOGE, ParallelConfig(**sizes)).experts


def state(experts):
    # Offsets as a block passes them, whose layers are one stacked tensor.
    return experts.sharded_state_dict("experts.", ((0, 0, 1),))


def round_trips(folder):
    equal = {}
    for source, target in (("EP2", "ETP2"), ("ETP2", "DP2")):
        path = Path(folder) / source
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        dist_checkpointing.save(state(build(source)), str(path))
        experts = build(target)
        expected = [parameter.detach().clone() for parameter in experts.parameters()]
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(float("nan"))
        loaded = dist_checkpointing.load(state(experts), str(path))
        experts.load_state_dict({name[8:]: value for name, value in loaded.items()})
        equal[source, target] = all(
            torch.equal(a, b) for a, b in zip(experts.parameters(), expected, strict=True)
        )
    return equal


@pytest.mark.distributed
def test_a_layout_reads_what_another_wrote():
    with tempfile.TemporaryDirectory() as folder:
        for found in gloo.run(2, round_trips, folder):
            assert len(found) == 2
            assert all(found.values()), found
