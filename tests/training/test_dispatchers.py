"""Every dispatcher trains the same model as one process does, with and without recomputation."""

import pytest
from gloo import run
from layouts import all_layouts
from test_layouts import farthest

STEPS = 20
SIZES = ["moe.top_k=4", "moe.num_expert_groups=4"]
TWO_NODES = ["launch.processes=2", "launch.nodes=2"]
EP4 = [*TWO_NODES, "parallel.expert_model_parallel_size=4"]
TP2 = "parallel.tensor_model_parallel_size=2"
EP2_TP2 = [*TWO_NODES, "parallel.expert_model_parallel_size=2", TP2]
LAYER = ["memory=selective", "memory.recompute_modules=[moe]"]
PARTS = ["memory=selective", "memory.recompute_modules=[moe_act,core_attn,layernorm]"]
ALL = ["memory=full"]
LAYOUTS = {
    "moge": {
        "hierarchical": [*EP4],
        "hierarchical, recomputed": [*EP4, *LAYER],
        "deduplicated, recomputed": [*EP4, *ALL],
        "deduplicated, sliced experts": [*EP2_TP2, "parallel.expert_tensor_parallel_size=2"],
        "alltoall": [*EP4],
        "allgather, recomputed": [*EP4, *PARTS],
        "moge": [*EP4],
        "moge, recomputed": [*EP2_TP2, *LAYER],
    },
    "top_k": {
        "hierarchical": [*EP4, *ALL],
        "hierarchical, tensor parallel": [*EP4, TP2],
        "hierarchical, one node": [*EP2_TP2],
        "deduplicated": [*EP4],
        "deduplicated, recomputed": [*EP2_TP2, *LAYER],
        "alltoall, recomputed": [*EP4, *LAYER],
        "allgather": [*EP4],
    },
}


@pytest.mark.distributed
@pytest.mark.parametrize("router", LAYOUTS)
def test_twenty_steps_equal_the_single_process(router):
    moe = [f"moe={router}", *SIZES]
    expected = run(1, all_layouts, {"single": moe}, 1, STEPS)[0]["single"]
    four = {
        name: [*moe, *overrides, f"moe.dispatcher={name.split(',')[0]}"]
        for name, overrides in LAYOUTS[router].items()
    }
    found = run(4, all_layouts, four, 4, STEPS)[0]
    errors = {name: farthest(values, expected) for name, values in found.items()}
    print(errors)
    assert errors.keys() == LAYOUTS[router].keys()
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
