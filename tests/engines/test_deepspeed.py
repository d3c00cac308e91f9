"""engine=deepspeed against engine=megatron: the same steps, the same moments, the same files."""

from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
from checkpoint_runs import train
from deepspeed_runs import Left, all_steps, asked_for, farthest, refusal, saved, through

from configs.deepspeed_keys import DECIDED, FIXED, IDLE, KEYS
from pangu.report.run_files import METRICS, read_metrics

DS = "engine=deepspeed"
EP2 = "parallel.expert_model_parallel_size=2"
# Else stage 3 keeps weights of up to 100,000 elements whole.
CUT = "stage3_param_persistence_threshold:0"
STAGE_3 = [DS, "parallel.zero_stage=3"]
# A loss beside the main one, and weights that nobody trains.
HEADS = ["model.mtp_num_layers=0", "model.leap_heads=2", "train.leap_heads_only=true"]
# Adapters alone, of which B begins at 0, and A's gradients with it. With the other layouts' epsilon
# AdamW makes whole steps of B's rounding, and A's moments are 2e-5 apart after two.
LORA = ["model.lora_rank=4", "model.lora_alpha=8", "optimizer.adam_eps=1e-3"]
LORA += [
    "model.lora_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2,experts_fc1,experts_fc2]"
]
BF16 = "backend.precision=bf16"
LAYOUTS = {
    "megatron": [],
    "megatron bf16": [BF16],
    "stage 2 bf16": [DS, "parallel.zero_stage=2", BF16],
    "stage 1 bf16": [DS, "parallel.zero_stage=1", BF16],
    "stage 1 bf16 offloaded": [DS, "parallel.zero_stage=1", BF16, "engine.offload=cpu"],
    "stage 3 bf16 offloaded": [*STAGE_3, BF16, "engine.offload=cpu"],
    "megatron heads": HEADS,
    "megatron lora": LORA,
    "stage 2 lora": [DS, "parallel.zero_stage=2", EP2, *LORA],
    **{f"stage {stage}": [DS, f"parallel.zero_stage={stage}"] for stage in (0, 1, 2)},
    "stage 3": [*STAGE_3, f"engine.config={{zero_optimization:{{{CUT}}}}}"],
    "stage 0 ep2": [DS, "parallel.zero_stage=0", EP2],
    "stage 2 ep2 recomputed": [DS, "parallel.zero_stage=2", EP2, "memory=full"],
    "stage 3 offloaded recomputed heads": [
        *STAGE_3,
        *HEADS,
        "engine.offload=cpu",
        "memory=full",
        f"engine.config={{zero_optimization:{{overlap_comm:true,{CUT}}}}}",
    ],
}
EXACT = [name for name in LAYOUTS if "megatron" not in name and "bf16" not in name]
IN_BF16 = [name for name in LAYOUTS if "stage" in name and "bf16" in name]
THROUGH = ["stage 2 ep2 recomputed", "stage 3", "stage 1 bf16", "stage 3 bf16 offloaded"]
# One run, its steps shared among engines: what each takes up the one before it has saved.
CHAIN = {2: LAYOUTS["stage 3"], 3: [DS, "parallel.zero_stage=1", EP2], 4: []}
# Whose pieces are large enough for DeepSpeed to put them into files.
LARGE = ["model.vocab_size=16384", *STAGE_3]
DRIVE = {"host": [*LARGE, "engine.offload=cpu"], "drive": [*LARGE, "engine.offload=nvme"]}
DRIVE |= {f"{name} bf16": [*line, BF16] for name, line in DRIVE.items()}
JUDGED = ["train.validate_every=1", "train.validation_batches=1"]
FIRST, LAST = (f"straight/checkpoints/step_0000000{step}" for step in (1, 4))


def everything(folder: Path) -> tuple[Any, ...]:
    """Steps in every layout; a run at a stretch, and from its first step on a chain of engines; a
    checkpoint through each optimizer's state and back."""
    path = f"engine.nvme_path={folder / 'drive'}"
    drive = {name: line + [path] * name.startswith("drive") for name, line in DRIVE.items()}
    left = all_steps(LAYOUTS | drive, 2)
    kept = ["checkpoint.save_every=1", "checkpoint.keep_last=4"]
    straight, _ = train(folder / "straight", ["train.steps=4", *kept, *JUDGED])
    for name in THROUGH:
        through(LAYOUTS[name], folder / LAST, folder / name.replace(" ", "_"))
    chain = {}
    source = f"checkpoint.resume={folder / FIRST}"
    for end, overrides in CHAIN.items():
        chain, _ = train(folder / "chain", [f"train.steps={end}", source, *overrides, *JUDGED])
        source = "checkpoint.resume=auto"
    said = refusal("{zero_optimization:{overlap_comm:perhaps}}")
    return left, straight, chain, said, asked_for()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[tuple[Any, ...]]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, gloo.run(2, everything, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXACT)
def test_losses_norms_weights_and_moments_are_those_of_megatron(runs, name):
    """With a clip that binds, decay, uneven masks, router losses and multi-token prediction; a NaN
    on one rank in between changes nothing. Moments are linear in gradients: a factor would show."""
    for rank, (left, *_) in enumerate(runs[1]):
        found = left[name]
        kind = next((f" {word}" for word in ("heads", "lora") if word in name), "")
        expected = left[f"megatron{kind}"]
        assert found.skipped == expected.skipped == [False, True, False]
        assert found.updates == expected.updates == 2
        worst = farthest(found, expected, rank, 2 if EP2 in LAYOUTS[name] else 1)
        assert worst.keys() >= {"rows", "weight", "main", "exp_avg", "exp_avg_sq"}
        assert {kind: error for kind, error in worst.items() if not error < 1e-5} == {}


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["", " bf16"])
def test_what_is_on_a_drive_is_what_would_be_in_memory_to_the_bit(runs, precision):
    for left, *_ in runs[1]:
        found, expected = left[f"drive{precision}"], left[f"host{precision}"]
        assert repr(found.rows) == repr(expected.rows)  # one is not a number
        assert found.skipped == [False, True, False]
        assert found.tensors.keys() == expected.tensors.keys()
        differ = [n for n, t in expected.tensors.items() if not torch.equal(found.tensors[n], t)]
        assert differ == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", IN_BF16)
def test_bfloat16_is_as_near_to_float32_as_megatrons(runs, name):
    """Rounding: what two engines in bfloat16 share is the model in float32."""
    for left, *_ in runs[1]:
        found, own, expected = left[name], left["megatron bf16"], left["megatron"]
        assert found.skipped == expected.skipped
        assert found.updates == expected.updates
        for row, other in zip(found.rows, own.rows, strict=True):
            assert row[0] == pytest.approx(other[0], rel=1e-3, nan_ok=True)
            assert row[1] == pytest.approx(other[1], rel=2e-2, nan_ok=True)
        for kind in ("main", "exp_avg", "exp_avg_sq"):
            apart, ratio = together(found, expected, kind)
            assert apart < 1.5 * together(own, expected, kind)[0], kind
            assert 0.97 < ratio < 1.03, kind  # a factor in gradients would show
        main = [tensor for kind, tensor in found.tensors.items() if kind.startswith("main ")]
        assert {tensor.dtype for tensor in main} == {torch.float32}


def together(found: Left, expected: Left, kind: str) -> tuple[float, float]:
    """Of all tensors of a kind as one: the difference, and the length, relative to the expected."""
    names = [name for name in expected.tensors if name.startswith(f"{kind} ")]
    ours, theirs = (torch.cat([x.tensors[n].view(-1) for n in names]) for x in (found, expected))
    length = theirs.norm()
    return float((ours - theirs).norm() / length), float(ours.norm() / length)


@pytest.mark.distributed
@pytest.mark.parametrize("name", THROUGH)
def test_a_checkpoint_through_deepspeed_is_the_same_to_the_bit(runs, name):
    folder, _ = runs
    expected = saved(folder / LAST)
    found = saved(folder / name.replace(" ", "_") / "checkpoints/step_00000004")
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in found)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.distributed
def test_a_run_goes_on_with_the_other_engine_and_back(runs):
    folder, left = runs
    for _, straight, chain, *_ in left:
        assert straight.keys() - chain.keys() == {1}
        for step, values in chain.items():
            assert values == pytest.approx(straight[step], rel=1e-5), step
    judged = [held_out(folder / name) for name in ("straight", "chain")]
    assert judged[0].keys() - judged[1].keys() == {1}
    assert judged[1] == {step: pytest.approx(judged[0][step], rel=1e-5) for step in judged[1]}


def held_out(run: Path) -> dict[int, float]:
    rows = read_metrics(run / METRICS)
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


@pytest.mark.distributed
def test_what_deepspeed_does_not_take_is_said_in_a_sentence(runs):
    for *_, said, _ in runs[1]:
        assert said.startswith("engine.config=")
        assert "DeepSpeed does not take it" in said
        assert "overlap_comm" in said
        assert "\n" not in said


@pytest.mark.distributed
def test_keys_of_its_json_are_those_that_deepspeed_asks_for(runs):
    """What it does not ask for it ignores without a word, and we refuse before a run."""
    asked = runs[1][0][-1]
    ours = {*KEYS, *FIXED, *(name for name in (*DECIDED, *IDLE) if "." not in name)}
    assert asked[""] <= ours
    assert ours - asked[""] <= asked["removed"] | {"sequence_parallel_size"}
    for section, names in KEYS.items():
        more = [name for name in (*DECIDED, *IDLE) if name.startswith(f"{section}.")]
        theirs = {name.partition(".")[2] for name in more}
        if names:
            assert asked[section] == {*names, *theirs}, section
