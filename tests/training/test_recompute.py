"""Whatever is computed again for the backward pass, losses and gradients stay as they were."""

from typing import get_args

import pytest
from gloo import run
from layouts import all_layouts

from configs.schema import RecomputeModule

# Every module there is: latent attention, a dense layer, experts and a shared one.
MODEL = [
    "model.num_layers=2",
    "model.num_dense_layers=1",
    "model.ffn_hidden_size=64",
    "model.attention=mla",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=8",
    "model.sandwich_norm=true",
]
ALL = [name for name in get_args(RecomputeModule) if name not in ("moe", "moe_fc1")]
POLICIES = {
    "none": [],
    **{
        ", ".join(names): ["memory=selective", f"memory.recompute_modules=[{','.join(names)}]"]
        for names in (
            ALL,
            ["moe_fc1", "moe_permute", "layernorm"],
            *([name] for name in get_args(RecomputeModule)),
        )
    },
    "full": ["memory=full"],
    "full, by blocks": ["memory=full", "memory.recompute_method=block"],
}


@pytest.mark.distributed
def test_recomputed_steps_equal_those_that_kept_everything():
    sizes = ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
    layouts = {name: [*MODEL, *sizes, *policy] for name, policy in POLICIES.items()}
    found = run(2, all_layouts, layouts, 2, 2)[0]
    expected = found.pop("none")
    assert len(found) == len(POLICIES) - 1
    for name, steps in found.items():
        assert steps == [pytest.approx(step, rel=1e-6) for step in expected], name
