"""Every parallel layout trains the same model as one process does."""

import pytest
from gloo import run
from layouts import all_layouts

STEPS = 20
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
ETP2 = "parallel.expert_tensor_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
TWO = {
    "dp2": [],
    "dp2 without sharded optimizer": ["parallel.zero_stage=0"],
    "ep2": [EP2],
    "ep2 allgather": [EP2, "moe.dispatcher=allgather"],
    "ep2 alltoall": [EP2, "moe.dispatcher=alltoall"],
    "tp2": [TP2],
    "pp2": [PP2],
    "pp2 vpp2": [PP2, VPP2],
    "cp2": [CP2],
    "etp2": [ETP2],
}
OVERLAP = "parallel.overlap_expert_parallel=true"
FOUR = {
    "tp2 ep2": [TP2, EP2],
    "pp2 ep2": [PP2, EP2],
    "pp2 vpp2 ep2 overlapped": [PP2, VPP2, EP2, OVERLAP],
}


def farthest(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> float:
    return max(
        abs(a - b) / abs(b)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.distributed
@pytest.mark.parametrize("router", ["moge", "top_k"])
def test_twenty_steps_equal_the_single_process(router):
    moe = [f"moe={router}"]
    two = {name: moe + overrides for name, overrides in TWO.items()}
    if router == "moge":
        two["ep2 moge"] = [*moe, EP2, "moe.dispatcher=moge"]
    four = {name: moe + overrides for name, overrides in FOUR.items()}
    expected = run(1, all_layouts, {"single": moe}, 1, STEPS)[0]["single"]
    assert farthest(expected[1:], expected[:-1]) > 1e-3, "every step looks alike"
    found = {**run(2, all_layouts, two, 2, STEPS)[0], **run(4, all_layouts, four, 4, STEPS)[0]}
    errors = {name: farthest(values, expected) for name, values in found.items()}
    print(errors)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.distributed
def test_multi_token_prediction_in_a_split_sequence_and_in_uneven_stages():
    mtp = ["model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.5", "model.num_layers=4"]
    uneven = "parallel.pipeline_layout="
    two = {"cp2": [CP2], "pp2 3+1": [PP2, uneven + "[3,1]"], "pp2 4+0": [PP2, uneven + "[4,0]"]}
    two = {name: mtp + overrides for name, overrides in two.items()}
    expected = run(1, all_layouts, {"single": mtp}, 1, 4)[0]["single"]
    assert len(expected[0]) == 3
    found = run(2, all_layouts, two, 2, 4)[0]
    errors = {name: farthest(values, expected) for name, values in found.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
