"""Each rule fires on the configuration that breaks it, and what it suggests works."""

from __future__ import annotations

import re
import time

import pytest
import yaml

from configs import groups
from configs.check import load_checked, violations, warnings
from configs.compose import load
from configs.problem import with_value
from configs.violation import ConfigError

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"

# overrides of the quick-start model, the key that must be named, a part of the reason
BROKEN = [
    ([f"{TP}=3", "devices=3", "train.global_batch_size=9", "train.seq_length=255"], TP, "4 attent"),
    (["devices=3", f"{TP}=2"], "devices", "does not divide 3 ranks"),
    (["launch.processes=3", f"{EP}=2"], "launch.processes", "expert x expert-tensor"),
    ([f"{TP}=2", "devices=2", "model.vocab_size=4097"], TP, "vocabulary of 4097"),
    (
        [f"{TP}=2", "devices=2", "parallel.sequence_parallel=false"],
        "parallel.sequence_parallel",
        "",
    ),
    ([f"{TP}=2", "devices=2", "train.seq_length=33"], "train.seq_length", "TP = 2 equal parts"),
    ([f"{CP}=2", "devices=2", "train.seq_length=254"], "train.seq_length", "2 x CP x TP"),
    ([f"{CP}=8", "devices=8"], CP, "4 heads over TP x CP = 1 x 8"),
    (["model.num_query_groups=3"], "model.num_query_groups", "cannot share 3"),
    (["model.hidden_size=190", "model.kv_channels=0"], "model.num_attention_heads", "head size"),
    (["model.kv_channels=47"], "model.kv_channels", "must be even"),
    ([f"{EP}=32", "devices=32", "train.global_batch_size=32"], EP, "16 experts"),
    ([f"{ETP}=3", "devices=3", "train.global_batch_size=3"], ETP, "width 64"),
    (["moe.num_expert_groups=5", "moe.top_k=5"], "moe.num_expert_groups", "16 experts"),
    (["moe.top_k=6"], "moe.num_expert_groups", "6 / 4"),
    (["moe.top_k=17", "moe.router=top_k"], "moe.top_k", "only 16 experts"),
    (["moe.router=group_limited"], "moe.topk_group", "between 1 and all 4"),
    (["moe.router=group_limited", "moe.topk_group=1", "moe.top_k=8"], "moe.topk_group", "fewer"),
    (["moe.softmax_after_top_k=true"], "moe.softmax_after_top_k", "router=top_k"),
    (["moe=top_k", "moe.top_k=1"], "moe.softmax_after_top_k", "learn nothing"),
    (["moe.router=expert_choice", "moe.expert_bias=true"], "moe.expert_bias", "without a bias"),
    (["moe.dispatcher=moge", "moe.capacity_factor=1.5"], "moe.dispatcher", "turns some away"),
    (["moe=expert_choice", "moe.capacity_factor=1"], "moe.capacity_factor", "fills every expert"),
    (["moe.dispatcher=moge", "moe=top_k"], "moe.dispatcher", "equal splits"),
    (
        ["moe.dispatcher=moge", f"{EP}=8", "devices=8"],
        "moe.dispatcher",
        "4 groups over 8 expert-parallel",
    ),
    (["moe.dispatcher=local", f"{EP}=2", "devices=2"], "moe.dispatcher", "EP x ETP = 2"),
    (
        ["moe.dispatcher=hierarchical", f"{EP}=2", "launch.processes=4"],
        "moe.dispatcher",
        "inside one",
    ),
    (
        ["moe.dispatcher=hierarchical", f"{EP}=4", "launch.processes=3", "launch.nodes=4"],
        "moe.dispatcher",
        "do not fill nodes of 3",
    ),
    (
        ["moe.dispatcher=hierarchical", f"{TP}=2", f"{ETP}=2", "devices=4"],
        "moe.dispatcher",
        "whole experts",
    ),
    ([f"{PP}=3", "devices=3", "train.global_batch_size=9"], PP, "4 layers do not fill"),
    ([f"{VPP}=2"], VPP, "only one"),
    ([f"{PP}=2", "devices=2", "parallel.pipeline_layout=[4]"], "parallel.pipeline_layout", "1 st"),
    (
        [f"{PP}=2", "devices=2", "parallel.pipeline_layout=[4,1]"],
        "parallel.pipeline_layout",
        "to 5",
    ),
    (["train.global_batch_size=7", "train.micro_batch_size=2"], "train.global_batch_size", "2 x 1"),
    (
        [f"{PP}=2", f"{VPP}=2", "devices=2", "train.global_batch_size=7"],
        "train.global_batch_size",
        "a multiple of PP = 2",
    ),
    (["memory=selective", "memory.recompute_modules=[]"], "memory.recompute_modules", "nothing"),
    (
        ["memory=selective", "memory.recompute_modules=[mla_up_proj]"],
        "memory.recompute_modules",
        "",
    ),
    (
        ["memory=selective", "memory.recompute_modules=[moe,moe_act]"],
        "memory.recompute_modules",
        "",
    ),
    (["memory=full", "memory.recompute_num_layers=9"], "memory.recompute_num_layers", "4 layers"),
    (["optimizer.min_lr=1"], "optimizer.min_lr", "cannot end above"),
    (["data=indexed"], "data.blend", "at least one"),
    (["parallel.schedule=zero_bubble"], "parallel.schedule", "the simulator plans it"),
    (["memory.swap=[mla_up_proj,moe_act]"], "memory.swap", "no mla_up_proj"),
    (["memory=selective", "memory.swap=[core_attn]"], "memory.swap", "recomputed too"),
    (
        ["memory=selective", "memory.recompute_modules=[moe_act]", "memory.swap=[moe_fc1]"],
        "memory.swap",
        "keeps what moe_fc1",
    ),
    (
        ["backend=cpu", "memory.swap_optimizer=true", "moe.placement=dynamic"],
        "moe.placement",
        "reads their file",
    ),
    (["memory=full", "memory.swap=[moe_act]"], "memory.swap", "nothing inside"),
    (
        [
            *["memory=selective", "memory.recompute_modules=[moe_permute]"],
            "moe.dispatch_chunks=2",
        ],
        "memory.recompute_modules",
        "all at once",
    ),
    (
        [
            *["memory=selective", "memory.recompute_modules=[moe_fc1]", "moe.dispatch_chunks=2"],
            *["model.lora_rank=4", "model.lora_modules=[experts_fc1]"],
            "parallel.overlap_grad_reduce=true",
        ],
        "moe.dispatch_chunks",
        "the first alone",
    ),
    (["moe.dispatch_chunks=1000", "train.seq_length=512"], "moe.dispatch_chunks", "512 tokens"),
    (["memory=auto", "hardware=h100"], "memory.limit_gib", "until a run stays below a limit"),
    (["memory.limit_gib=2"], "memory.limit_gib", "only memory=auto"),
    (["memory=auto", "memory.limit_gib=2"], "hardware", "of a machine"),
    (
        ["memory=auto", "memory.limit_gib=2", "hardware=h100", "memory.swap=[moe_act]"],
        "memory.swap",
        "chooses what is swapped",
    ),
    (
        ["parallel.schedule=gpipe", "parallel.overlap_expert_parallel=true"],
        "parallel.overlap_expert_parallel",
        "beside a forward",
    ),
    (
        ["model=pangu_ultra_dense", "parallel.overlap_expert_parallel=true"],
        "parallel.overlap_expert_parallel",
        "no experts",
    ),
    (["parallel.zero_stage=3"], "parallel.zero_stage", "the simulator plans it"),
    ([f"{CP}=2", "devices=2", "parallel.context_parallel_type=ring"], "parallel.context_par", ""),
    (["backend.precision=fp8"], "backend.precision", "the simulator plans it"),
    (["backend.precision=fp16"], "backend.precision", "a scaled loss"),
    (["backend=npu", "backend.precision=fp64"], "backend.precision", "double-precision"),
    (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather", "zero_stage>=1"),
    (["model.activation=gelu"], "model.activation", "SwiGLU"),
    (["model.add_mlp_bias=true"], "model.add_mlp_bias", "without biases"),
    (["model.vocab_size=256"], "model.vocab_size", "257 tokens"),
    (["train.steps=0"], "train.steps", "at least 1"),
    ([f"{TP}=0"], TP, "at least 1"),
    (["checkpoint.resume=nowhere"], "checkpoint.resume", "no such folder"),
    (["model.num_dense_layers=1"], "model.ffn_hidden_size", "1 dense layers"),
    (["model=pangu_ultra_dense", f"{EP}=2", "devices=2"], EP, "no experts"),
    (["model.attention=mla"], "model.kv_lora_rank", "latent attention"),
]


@pytest.mark.parametrize(("overrides", "key", "reason"), BROKEN, ids=lambda value: str(value)[:60])
def test_broken_rule_is_named(overrides: list[str], key: str, reason: str) -> None:
    found = violations(load(overrides))
    assert any(v.key.startswith(key) and reason in v.reason for v in found), found


def test_suggestions_work() -> None:
    """Every `key=a, b or c` that is suggested leaves fewer violations when it is tried."""
    tried = 0
    for overrides, _, _ in BROKEN:
        config = load(overrides)
        before = violations(config)
        for violation in before:
            for part in violation.suggestion.split("; or "):
                match = re.fullmatch(r"([a-z_.]+)=([^{\[]+)", part)
                for value in re.split(r", | or ", match[2]) if match else []:
                    after = violations(with_value(config, match[1], yaml.safe_load(value)))
                    assert len(after) < len(before), (violation, value, after)
                    tried += 1
    assert tried > 100


def test_all_violations_at_once_with_unknown_keys() -> None:
    overrides = [
        "moe.top_kk=3",  # unknown key
        "model=nonesuch",  # unknown preset
        "train.steps=many",  # wrong type
        "train.micro_batch_size=3",  # does not divide the batch of 8
        "moe.num_expert_groups=3",  # does not divide 16 experts
        "what is this",  # not an override at all
    ]
    with pytest.raises(ConfigError) as caught:
        load_checked(overrides)
    keys = [violation.key for violation in caught.value.violations]
    assert {
        "moe.top_kk",
        "model",
        "train.steps",
        "train.global_batch_size",
        "moe.num_expert_groups",
        "what is this",
    } <= set(keys)
    suggestions = {v.key: v.suggestion for v in caught.value.violations}
    assert "top_k" in suggestions["moe.top_kk"]
    assert "pangu_pro_moe" in suggestions["model"]


# what cannot even be read, the key that must be named, a part of the reason and of the suggestion
UNREADABLE = [
    ("train.steps=many", "train.steps", "valid integer", "a whole number; the default is 100"),
    ("moe.router=best", "moe.router", "unknown value", "one of moge, top_k, group_limited"),
    ("moe.expert_bias=perhaps", "moe.expert_bias", "valid boolean", "true or false"),
    ("train=3", "train", "group of keys", "train.KEY=VALUE, of steps"),
    ("optimizer.phases=[{steps: 3}]", "optimizer.phases.0.lr", "missing", "a number"),
    ("memory.recompute_modules=[all]", "memory.recompute_modules.0", "unknown value", "core_attn"),
    ("data.blend={a: much}", "data.blend.a", "valid number", "a number"),
    ("moe=moge,top_k", "moe", "several values", "one of them"),
    ("model={a: 1}", "model", "group of keys", "one of deepseek_v3"),
    ("backend=null", "backend", "there is no file", "one of auto, cpu"),
    ("--steps", "--steps", "not of the form key=value", "key=value"),
    ("data.blend={ü: 1}", "data.blend", "'ü'", "quotes"),
    ("optimizer.lr=nan", "optimizer.lr", "finite", "optimizer.lr=0"),
    ("optimizer.min_lr=inf", "optimizer.min_lr", "finite", "optimizer.min_lr=0"),
    ("optimizer.adam_beta2=1", "optimizer.adam_beta2", "0.999999", "optimizer.adam_beta2=0.999"),
    ("seed=-1", "seed", "at least 0", "seed=0"),
    ("data.blend={a: nan}", "data.blend.a", "finite", "data.blend.a=1.0"),
]


@pytest.mark.parametrize(("override", "key", "reason", "suggestion"), UNREADABLE)
def test_unreadable_values_are_named(override: str, key: str, reason: str, suggestion: str) -> None:
    """Alone, and beside something else that is wrong, which must be found as well."""
    with pytest.raises(ConfigError) as caught:
        load_checked([override, "checkpoint.keep_last=0"])
    found = {violation.key: violation for violation in caught.value.violations}
    assert reason in found[key].reason
    assert suggestion in found[key].suggestion
    assert "checkpoint.keep_last" in found


@pytest.mark.parametrize("folder", ["a b/ü", "a=b", "it's", "50%, (new) #2", "$x", '"a'])
def test_a_path_is_taken_as_it_is(folder: str) -> None:
    assert load([f"run_dir={folder}"]).run_dir == folder


def test_suggestions_with_several_things_wrong() -> None:
    """A tensor parallel size is only suggested where the ranks are enough for it."""
    overrides = [f"{TP}=3", "launch.processes=4", "moe.top_k=6", "train.micro_batch_size=3"]
    found = [v for v in violations(load(overrides)) if v.key == TP]
    assert len(found) >= 3
    assert {v.suggestion for v in found} == {f"{TP}=1, 2 or 4", f"{TP}=1 or 2"}


def test_suggested_values_are_the_right_ones() -> None:
    (violation,) = violations(load(["moe.num_expert_groups=8", "moe.top_k=4"]))
    assert violation.suggestion == "moe.num_expert_groups=1, 2 or 4; or moe.top_k=8"
    assert str(violation).startswith("moe.num_expert_groups=8: ")


def test_simulator_plans_what_the_trainer_refuses() -> None:
    overrides = ["parallel.schedule=zero_bubble", "parallel.zero_stage=3", "backend.precision=fp8"]
    assert len(violations(load(overrides), purpose="train")) == 3
    assert violations(load(overrides), purpose="plan") == []


@pytest.mark.parametrize(
    "size", [f"{TP}=2", f"{PP}=2", f"{CP}=2", f"{EP}=2", f"{ETP}=2", f"{PP}=2 {VPP}=2", f"{EP}=1"]
)
@pytest.mark.parametrize("router", ["moge", "top_k"])
def test_quick_start_splits_by_two_along_every_axis(size: str, router: str) -> None:
    load_checked(["experiment=quickstart", f"moe={router}", *size.split()])


@pytest.mark.parametrize("name", groups()["experiment"])
def test_experiments_are_valid_on_their_own(name: str) -> None:
    load_checked([f"experiment={name}"])


@pytest.mark.parametrize(
    ("model", "parallel", "devices"),
    [("pangu_pro_moe", "pangu_pro", 4000), ("pangu_ultra_moe", "pangu_ultra", 6144)],
)
def test_published_layouts_are_valid(model: str, parallel: str, devices: int) -> None:
    config = load([f"model={model}", f"parallel={parallel}", f"devices={devices}"])
    config.train.global_batch_size = 80 * config.data_parallel_size
    config.train.seq_length = 4096
    assert violations(config) == []


def test_ten_thousand_ranks_take_no_time() -> None:
    """A broken layout, so that suggestions are tried too. Generous: it takes milliseconds."""
    start = time.process_time()
    found = violations(load(["model=pangu_pro_moe", "parallel=pangu_pro", "devices=10001"]))
    assert {v.key for v in found} >= {"devices"}
    assert time.process_time() - start < 5


def test_warnings() -> None:
    def keys(*overrides: str) -> list[str]:
        return [warning.key for warning in warnings(load(list(overrides)))]

    assert keys() == []
    assert "causal" in warnings(load(["moe=expert_choice"]))[0].reason
    assert keys("moe=forced_balance") == ["moe.router"]
    assert keys(f"{EP}=8", "devices=8") == [EP]
    assert keys("backend=cpu", "backend.precision=bf16") == ["backend.precision"]
    assert keys("train.seq_length=8192") == ["train.seq_length"]
    assert keys("optimizer.warmup_steps=100") == ["optimizer.warmup_steps"]
    assert keys("parallel.num_noop_layers=1") == ["parallel.num_noop_layers"]


def test_every_preset_reads() -> None:
    for group, names in groups().items():
        if group in ("hardware", "experiment"):
            continue
        for name in names:
            load([f"{group}={name}"])


def test_three_phases_of_pangu_pro() -> None:
    """Tokens and sequence of each phase as published, to the step."""
    config = load_checked(["experiment=pangu_pro_three_phases"])
    phases = config.optimizer.phases
    tokens = [
        phase.steps
        * (phase.global_batch_size or config.train.global_batch_size)
        * (phase.seq_length or config.train.seq_length)
        for phase in phases
    ]
    assert tokens == pytest.approx([9.6e12, 3e12, 0.4e12], rel=1e-4)
    assert config.train.steps == sum(phase.steps for phase in phases)
    assert [phase.lr for phase in phases[1:]] == [phase.min_lr for phase in phases[:-1]]


def test_phases_are_checked_too() -> None:
    phase = "{name: long, steps: 100, lr: 1e-3, min_lr: 1e-2, global_batch_size: 3, seq_length: 33}"
    overrides = [f"optimizer.phases=[{phase}]", f"{TP}=2", "launch.processes=4", "train.steps=101"]
    found = {v.key: v for v in violations(load(overrides))}
    assert set(found) == {
        "optimizer.phases[0].min_lr",
        "optimizer.phases[0].global_batch_size",
        "optimizer.phases[0].seq_length",
        "train.steps",
    }
    assert "2 or 4" in found["optimizer.phases[0].global_batch_size"].suggestion
    assert found["train.steps"].suggestion == "train.steps=100"
    (empty,) = violations(load([f"optimizer.phases=[{phase.replace('100', '0')}]"]))[:1]
    assert (empty.key, empty.reason) == ("optimizer.phases[0].steps", "must be at least 1")


@pytest.mark.parametrize("moe", groups()["moe"])
@pytest.mark.parametrize("model", [m for m in groups()["model"] if m != "pangu_ultra_dense"])
def test_every_routing_fits_every_model(moe: str, model: str) -> None:
    if moe == "group_limited" and model != "deepseek_v3":
        moe = "group_limited moe.num_expert_groups=2 moe.topk_group=1"
    load_checked([f"model={model}", *f"moe={moe}".split()])


def test_positions_restart_only_where_that_can_be():
    reset = ["data.reset_position_ids=true"]
    with pytest.raises(ConfigError, match=r"data\.reset_position_ids=True.*nothing restarts"):
        load_checked(reset)
    load_checked([*reset, "data.reset_attention_mask=true"])
    load_checked([*reset, "model.position_embedding=learned"])


def test_balance_by_bias_is_a_preset():
    moe = load_checked(["moe=bias_balanced", "moe.num_expert_groups=1"]).moe
    assert (moe.router, moe.expert_bias, moe.aux_loss_coefficient) == ("top_k", True, 0.0)
