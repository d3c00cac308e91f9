"""Which dispatcher is taken, and what the MoGE dispatcher does without."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.dispatch import dispatcher
from configs.schema import ParallelConfig
from pangu.moe.dispatch import MogeDispatcher
from pangu.ops.choice import choices

EXPERT_CHOICE = replace(layers.TOP_K, router="expert_choice")


@pytest.mark.parametrize(
    ("moe", "sizes", "expected"),
    [
        (layers.MOGE, (1, 1), "local"),
        (layers.MOGE, (2, 1), "moge"),
        (layers.MOGE, (4, 2), "moge"),
        (layers.MOGE, (8, 1), "alltoall"),
        (layers.MOGE, (1, 2), "moge"),
        (layers.TOP_K, (1, 1), "local"),
        (layers.TOP_K, (2, 1), "allgather"),  # 3 choices: an exchange moves as many rows or more
        (layers.TOP_K, (3, 2), "allgather"),
        (layers.TOP_K, (4, 1), "allgather"),
        (layers.TOP_K, (8, 1), "deduplicated"),
        (replace(layers.TOP_K, top_k=1), (4, 1), "alltoall"),
        (replace(layers.MOGE, num_expert_groups=2), (4, 1), "allgather"),
        (EXPERT_CHOICE, (1, 1), "local"),
        (EXPERT_CHOICE, (2, 1), "alltoall"),
        (replace(layers.MOGE, dispatcher="allgather"), (2, 1), "allgather"),
    ],
)
def test_auto(moe, sizes, expected):
    assert dispatcher(moe, *sizes) == expected


@pytest.mark.parametrize(
    ("moe", "sizes", "message"),
    [
        (replace(layers.MOGE, dispatcher="local"), (2, 1), "EP x ETP = 2"),
        (replace(layers.MOGE, dispatcher="moge", capacity_factor=1), (2, 1), "turns some away"),
        (replace(layers.TOP_K, dispatcher="moge"), (2, 1), "router=moge"),
        (replace(layers.MOGE, dispatcher="moge"), (8, 1), "4 groups over 8"),
    ],
)
def test_a_dispatcher_that_cannot_serve_is_refused(moe, sizes, message):
    with pytest.raises(ValueError, match=message):
        dispatcher(moe, *sizes)


def test_choices_are_ascending_and_carry_gradients():
    weights = torch.tensor([[0.1, 0.5, 0.0, 0.4]], requires_grad=True)
    chosen = torch.tensor([[False, True, True, False]])
    indices, picked = choices(weights, chosen, 2)
    assert indices.tolist() == [[1, 2]]
    assert picked.tolist() == [[0.5, 0.0]]
    picked.sum().backward()
    assert weights.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "item",
    "bincount",
    "unique",
    "repeat_interleave",
)


def trace(dispatcher):
    """Operators of one dispatch and combine, and the shapes in between, for three inputs."""
    gloo.parallel(ranks_per_node=1, expert_model_parallel_size=2)
    moe = replace(layers.MOGE, dispatcher=dispatcher)
    layer = layers.build(moe, ParallelConfig(expert_model_parallel_size=2))
    names, rows = [], []
    for _ in range(3):
        hidden = torch.randn(16, 1, layers.HIDDEN, dtype=torch.float64)
        probs, routing_map = layer.route(hidden)
        with Operators() as operators:
            stages = layer.token_dispatcher
            record, sent, weights = stages.dispatch_preprocess(hidden, routing_map, probs)
            received, weights = stages.token_dispatch(record, sent, weights)
            experts = stages.dispatch_postprocess(record, received, weights)[0]
            output = stages.token_combine(record, stages.combine_preprocess(record, experts))
            stages.combine_postprocess(record, output)
        names += operators.names
        rows.append(experts.size(0))
    return names, rows, isinstance(getattr(stages, "inside", stages), MogeDispatcher)


@pytest.mark.distributed
def test_moge_waits_for_no_device_and_its_shapes_are_known_beforehand():
    found = gloo.run(2, trace, "moge") + gloo.run(2, trace, "hierarchical")
    for names, rows, is_moge in found:
        assert is_moge
        assert rows == [16 * 2 * 4 // 2] * 3  # tokens of both ranks, half of the choices each
        assert not [name for name in names if any(word in name for word in WAITING)]
    names, _, _ = gloo.run(2, trace, "alltoall")[0]
    assert [name for name in names if any(word in name for word in WAITING)]  # the test can fail
