"""Whatever waits on the host between passes or steps, losses and gradients stay as they were."""

import pytest
from gloo import run
from layouts import all_layouts
from test_recompute import MODEL

BOTH = [
    "memory=selective",
    "memory.recompute_modules=[layernorm,moe_permute]",
    "memory.swap=[core_attn,mla_up_proj,mlp,moe_act,moe_fc1,shared_experts]",
]
EVERYTHING = ["memory.swap=[core_attn,layernorm,mla_up_proj,mlp,moe]"]
PARTS = ["memory.swap=[moe_act,moe_fc1,moe_permute,shared_experts]"]
SIZES = ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
STAGES = ["parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=2"]
LAYOUTS = {
    "sizes": SIZES,
    "sizes, everything": [*SIZES, *EVERYTHING],
    "sizes, parts": [*SIZES, *PARTS],
    "sizes, both": [*SIZES, *BOTH],
    "sizes, optimizer": [*SIZES, "memory.swap_optimizer=true"],
    "stages": STAGES,
    "stages, everything": [*STAGES, *EVERYTHING],
    "stages, both, optimizer": [*STAGES, *BOTH, "memory.swap_optimizer=true"],
}


@pytest.mark.distributed
def test_swapped_steps_equal_those_that_kept_everything():
    layouts = {
        name: [*MODEL, "train.seq_length=128", *overrides] for name, overrides in LAYOUTS.items()
    }
    found = run(2, all_layouts, layouts, 2, 3)[0]
    for name, steps in found.items():
        expected = found[name.split(",")[0]]
        assert steps == [pytest.approx(step, rel=1e-6) for step in expected], name
