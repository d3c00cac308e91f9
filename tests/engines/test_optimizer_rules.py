"""What AdamW does to which parameter, against plain torch, and that a skipped step does nothing."""

from dataclasses import replace

import gloo
import in_interpreter  # noqa: F401 - before any kernel
import pytest
import torch
from trained_model import build, micro_batch

from pangu import backends

RULES = ["optimizer.lr=0.1", "optimizer.weight_decay=0.5", "optimizer.clip_grad=1.0"]
# Every parameter of the model with every feature, and whether it decays: matrices do.
DECAYS = {
    "word_embeddings.weight": True,
    "output_layer.weight": True,
    "linear_qkv.weight": True,
    "linear_qkv.bias": False,
    "linear_proj.weight": True,
    "linear_proj.bias": False,
    "q_layernorm.weight": False,
    "k_layernorm.weight": False,
    "input_layernorm.weight": False,
    "pre_mlp_layernorm.weight": False,
    "final_layernorm.weight": False,
    "self_attn_bda.norm.weight": False,
    "mlp_bda.norm.weight": False,
    "enorm.weight": False,
    "hnorm.weight": False,
    "eh_proj.weight": True,
    "linear_fc1.weight": True,
    "linear_fc2.weight": True,
    "router.weight": True,
    "router.router_scale": False,
    "experts.w1": True,
    "experts.w2": True,
}
LATENT = {
    "linear_q_down_proj.weight": True,
    "linear_q_up_proj.weight": True,
    "linear_kv_down_proj.weight": True,
    "linear_kv_up_proj.weight": True,
    "q_layernorm.weight": False,
    "kv_layernorm.weight": False,
}
MLA = [
    "model.attention=mla",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=12",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=6",
    "model.add_qkv_bias=false",
    "model.add_attention_output_bias=false",
]


def decays(name: str, table: dict[str, bool]) -> bool:
    (end,) = [end for end in table if name.endswith("." + end) or name == end]
    return table[end]


def after_zero_gradients(overrides: list[str], world_size: int = 1) -> dict[str, torch.Tensor]:
    """Every parameter after one step with gradients of zero, over what it was before."""
    model = build([*RULES, *overrides], world_size)
    before = {name: value.detach().clone() for name, value in model.parameters().items()}
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.prepare_grads()
    model.optimizer.step_with_ready_grads()
    ratios = {}
    for name, value in model.parameters().items():
        kept = before[name] != 0
        ratios[name] = (value.detach()[kept] / before[name][kept]).float()
    return ratios


@pytest.mark.parametrize("mla", [False, True])
def test_every_parameter_and_its_decay(mla):
    gloo.single()
    table = DECAYS | LATENT if mla else DECAYS
    ratios = after_zero_gradients(MLA if mla else [])
    for name, ratio in ratios.items():
        expected = 1 - 0.1 * 0.5 if decays(name, table) else 1.0
        assert torch.allclose(ratio, torch.tensor(expected), atol=1e-6), name
    seen = {end for end in table for name in ratios if name.endswith(end)}
    assert seen >= set(LATENT if mla else DECAYS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.zero_stage=1"],
        ["parallel.zero_stage=0", "backend.precision=bf16"],
        ["parallel.zero_stage=1", "backend.precision=bf16"],
        ["parallel.expert_model_parallel_size=2"],
    ],
)
def test_decay_wherever_the_optimizer_keeps_the_weights(overrides):
    for ratios in gloo.run(2, after_zero_gradients, overrides, 2):
        for name, ratio in ratios.items():
            expected = 1 - 0.1 * 0.5 if decays(name, DECAYS) else 1.0
            tolerance = 5e-3 if "backend.precision=bf16" in overrides else 1e-6
            assert ((ratio - expected).abs() <= tolerance).all(), name


def followed(overrides: list[str], world_size: int) -> list[tuple[bool, bool, bool]]:
    """After two steps on the plain form and on the kernel: whether weights are their main copies
    rounded (in the interpreter: cut off), moments in bfloat16, and told in float32 to the bit."""
    found = []
    for form in ("fused", "triton"):
        here = backends.current().operators
        backends.use(replace(here, adamw=form))
        model = build([*RULES, "optimizer.lr=0.01", *overrides], world_size)
        for number in range(2):
            model.step([micro_batch(number)])
        backends.use(here)
        near, narrow, whole = True, True, True
        for part in (part for part in model.engine.state_parts() if part.main is not None):
            weights = part.parameter.detach().view(-1)[part.start : part.end]
            main = part.main.detach().view(-1)
            near &= bool(((weights - main).abs() <= 2**-7 * main.abs()).all())
            moment = part.local("exp_avg_sq")
            narrow &= moment.dtype == torch.bfloat16
        for part in model.engine.state_parts():
            told = part.whole("exp_avg_sq")
            kept = part.local("exp_avg_sq")
            whole &= told.dtype == torch.float32
            if kept is not None:
                piece = told.view(-1)[part.start : part.end]
                whole &= torch.equal(piece, kept.float().view(-1))
        found.append((near, narrow, whole))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_weights_follow_and_moments_are_narrow_wherever_they_are_kept(zero_stage):
    overrides = [f"parallel.zero_stage={zero_stage}", "backend.precision=bf16"]
    overrides += ["optimizer.moments_dtype=bf16"]
    for found in gloo.run(2, followed, overrides, 2):
        assert found == [(True, True, True)] * 2


def test_the_norm_is_that_of_all_gradients():
    gloo.single()
    model = build(["optimizer.clip_grad=0"])
    norm = model.step([micro_batch(1), micro_batch(2)]).grad_norm
    gradients = [value.main_grad.flatten() for value in model.parameters().values()]
    assert norm == pytest.approx(torch.cat(gradients).double().norm().item(), rel=1e-6)


def test_three_steps_are_those_of_torch():
    """AdamW of torch with groups made by hand, on our gradients, clipped by hand."""
    gloo.single()
    model = build([*RULES, "optimizer.lr=0.01"])
    twins = {
        name: torch.nn.Parameter(value.detach().clone())
        for name, value in model.parameters().items()
    }
    matrices = [twin for name, twin in twins.items() if decays(name, DECAYS)]
    vectors = [twin for name, twin in twins.items() if not decays(name, DECAYS)]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for number in range(3):
        model.step([micro_batch(number), micro_batch(10 + number)])
        for name, value in model.parameters().items():
            # The engine clips its buffers in place: these are the gradients that AdamW saw.
            twins[name].grad = value.main_grad.detach().clone()
        norm = torch.stack([twin.grad.norm() for twin in twins.values()]).norm()
        assert norm <= 1.0 + 1e-5
        oracle.step()
        for name, value in model.parameters().items():
            assert torch.allclose(value, twins[name], rtol=1e-5, atol=1e-7), (number, name)


def everything(model) -> dict[str, torch.Tensor]:
    """Every tensor that a step may change: weights, buffers, main copies, moments, counters."""
    held = {}
    for number, chunk in enumerate(model.chunks):
        held |= {f"{number}.{name}": value for name, value in chunk.module.named_parameters()}
        held |= {f"{number}.{name}": value for name, value in chunk.module.named_buffers()}
    for group, part in enumerate(model.optimizer.chained_optimizers):
        for index, state in enumerate(part.optimizer.state.values()):
            held |= {f"state {group}.{index}.{key}": value for key, value in state.items()}
        for index, parameters in enumerate(part.optimizer.param_groups):
            held[f"step {group}.{index}"] = parameters.get("step", 0)
            for number, value in enumerate(parameters["params"]):
                held[f"main {group}.{index}.{number}"] = value
    return held


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).clone() for name, value in everything(model).items()}


def skipped_step(overrides: list[str], world_size: int = 1) -> tuple[bool, list[str], list[str]]:
    """(skipped, what a poisoned step changed, what the good step after it left alone)."""
    model = build(overrides, world_size)
    good = [micro_batch(1), micro_batch(2)]
    model.step(good)
    before = snapshot(model)
    weight = model.parameters()["decoder.layers.1.mlp.router.weight"]
    with torch.no_grad():  # a weight that poisons the step, put right again before looking
        kept = weight.clone()
        weight.fill_(float("nan"))
        result = model.step(good)
        weight.copy_(kept)
    now = everything(model)
    changed = [name for name, value in now.items() if not torch.equal(value, before[name])]
    after = snapshot(model)
    model.step(good)
    alone = [
        name
        for name, value in everything(model).items()
        if torch.equal(value, after[name]) and name.endswith(("router.expert_bias", "w1"))
    ]
    return result.skipped, changed, alone


def test_a_skipped_step_changes_nothing():
    gloo.single()
    skipped, changed, alone = skipped_step([])
    assert skipped
    assert changed == []
    assert alone == []  # the bias does move in a step that counts


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_skipped_step_changes_nothing_on_any_rank(zero_stage):
    overrides = ["parallel.expert_model_parallel_size=2", f"parallel.zero_stage={zero_stage}"]
    for skipped, changed, _ in gloo.run(2, skipped_step, overrides, 2):
        assert skipped
        # The poisoned weight's main copy lives elsewhere than the weight where it is sharded.
        assert changed == []
