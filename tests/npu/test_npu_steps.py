"""Whole training steps through torch-npu's real devices, process group and operators equal those
of one process on a CPU, with CANN stood in for (see `tests/npu/__main__.py`)."""

import json
import os
import subprocess
import sys

import pytest
from gloo import run
from layouts import all_layouts
from npu.standins import ROOT, build, environment, missing

# The quick start's model and batch; its text, which has to be prepared, is not needed here.
MODEL = [
    "experiment=quickstart",
    "data=synthetic",
    "model.vocab_size=512",
    "model.num_layers=2",
    "train.seq_length=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
]
FLOAT32 = [*MODEL, "backend.precision=fp32"]
ALONE = {
    "moge": FLOAT32,
    "top_k": [*FLOAT32, "moe=top_k", "moe.dispatcher=alltoall"],
    "bf16": [*MODEL, "backend.precision=bf16"],
}
TWO = "parallel.expert_model_parallel_size=2"
TENSOR = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
# Of which of these, and what is given beside.
LAYOUTS = {
    "experts, swapped": ("moge", [TWO, "memory.swap=[core_attn,layernorm,moe]"]),
    "experts, overlapped": ("top_k", [TWO, "parallel.overlap_expert_parallel=true"]),
    "tensors": ("moge", TENSOR),
    "experts": ("bf16", [TWO]),  # gradients are added to float32 sums by an operator of their own
}
TOLERANCES = {"bf16": 5e-4}
# What a step calls of torch-npu's; each has to fit its real schema.
CALLED = {
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_grouped_matmul",
    "npu_grouped_matmul_add_",
    "npu_moe_token_permute",
    "npu_moe_token_permute_grad_v2",
    "npu_moe_token_unpermute_grad_v2",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_swiglu",
    "npu_swiglu_backward",
    "alltoall_base_",
}


@pytest.mark.distributed
@pytest.mark.skipif(
    missing() and "CI" not in os.environ,  # a check that CI leaves out is none
    reason="needs torch-npu in .torch-npu (make .torch-npu/.installed), cc, g++ and nm",
)
def test_operators_and_steps_on_npus_equal_those_on_a_cpu(tmp_path):
    build(tmp_path)
    layouts = {
        name: [*ALONE[model], *words, "backend=npu"] for name, (model, words) in LAYOUTS.items()
    }
    (tmp_path / "layouts.json").write_text(json.dumps({"layouts": layouts, "steps": 2}))
    there = environment(tmp_path) | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    there["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "tests.npu.steps", "layouts.json", "results.json"]
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["wrong"] == []
    assert found["without kernel"] == []
    expected = run(1, all_layouts, ALONE, 1, 2)[0]
    for name, steps in found["steps"].items():
        model = LAYOUTS[name][0]
        tolerance = TOLERANCES.get(model, 1e-5)
        assert [tuple(each) for each in steps] == [
            pytest.approx(each, rel=tolerance) for each in expected[model]
        ], name
    assert found["attention"] == ["BNSD", "TND"]
    assert {name.split(".")[1] for name in found["called"]} >= CALLED
    assert found["swapped"] > 1 << 19
    # Steps, layers, ways: in the backward pass, and in the forward pass beside it.
    assert found["handed over"] == [2 * 2 * 2, 2 * 2 * 2]
    memory = {"device_memory_used_gib": 0.0, "device_memory_total_gib": 64.0}  # as acl.c says
    assert found["sensors"] == memory
