"""The headline of arXiv 2505.04519: 6,144 NPUs, 1.46 M tokens/s, MFU 30.0 %.

Batch, sequence length and part are not published. 4K sequences, 64 micro-batches and the 280T part
are the reading under which throughput and MFU agree (attention counted in full). How much of the
expert exchange was hidden is not published either: the preset has half, as of any other collective
on this part. With the 98 % of the follow-up report the forecast's MFU is 35 % (there: 41 %, at 8K).
"""

import pytest

from configs.compose import load
from simulator.parameters import model_flops_per_token
from simulator.predict import predict

RUN = ["model=pangu_ultra_moe", "simulation=fused", "hardware=ascend_910b_280t", "devices=6144"]
RUN += ["parallel=pangu_ultra", "parallel.overlap_expert_parallel=true", "train.micro_batch_size=2"]
RUN += ["train.global_batch_size=6144", "train.seq_length=4096", "simulation.tp_comm_overlap=true"]


def test_published_throughput_and_mfu() -> None:
    config = load([*RUN, "moe.dispatcher=hierarchical"])
    result = predict(config)
    assert result.tokens_per_second == pytest.approx(1.46e6, rel=0.10)
    counted_in_full = model_flops_per_token(config, causal=False)
    mfu = result.tokens_per_second_per_device * counted_in_full / 245.8e12
    assert mfu == pytest.approx(0.300, rel=0.10)
    assert result.fits
    later = predict(load([*RUN, "moe.dispatcher=hierarchical", "hardware.overlap.exchange=0.98"]))
    assert mfu * result.step_seconds / later.step_seconds == pytest.approx(0.346, abs=0.01)


def test_overlap_is_worth_its_trouble() -> None:
    hidden = predict(load([*RUN, "moe.dispatcher=hierarchical"]))
    shown = predict(
        load([*RUN, "parallel.overlap_expert_parallel=false", "moe.dispatcher=alltoall"])
    )
    assert shown.step_seconds > 1.1 * hidden.step_seconds
