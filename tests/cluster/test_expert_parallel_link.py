"""Expert parallelism across a real link sends what the dispatchers' formulas say."""

import expert_parallel_link as benchmark
import pytest

from cluster.privileges import needs_cluster

pytestmark = [pytest.mark.distributed, needs_cluster]


def test_bytes_across_the_link_are_those_of_the_formulas() -> None:
    shape = benchmark.Shape(tokens=512, hidden=256, width=32, experts=16, top_k=4)
    ranks = benchmark.measure(None, shape, rounds=1)
    for (router, dispatcher), *sides in zip(benchmark.VARIANTS, *ranks, strict=True):
        for side in sides:
            where = f"{router}, {dispatcher}"
            assert side["bytes"] == pytest.approx(side["formula"], rel=0.05), where
    sent = {
        variant: max(side["bytes"] for side in sides)
        for variant, *sides in zip(benchmark.VARIANTS, *ranks, strict=True)
    }
    # A token goes to the other node once, where rows would take it there twice, of four choices.
    assert sent["moge", "alltoall"] > 1.8 * sent["moge", "moge"]
    assert sent["top_k", "alltoall"] > 1.5 * sent["moge", "moge"]
