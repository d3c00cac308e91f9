"""How much each dispatcher sends, in the numbers that its documentation and the reference give."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
import torch.distributed as dist
import traffic

from configs.schema import ParallelConfig

TOKENS, RANKS = 24, 4
HERE = layers.EXPERTS // RANKS
SHARED_RANKS = replace(layers.TOP_K, top_k=4)
CASES = {
    ("alltoall", "top_k"): SHARED_RANKS,
    ("deduplicated", "top_k"): SHARED_RANKS,
    ("deduplicated", "expert_choice"): replace(SHARED_RANKS, router="expert_choice"),
    ("allgather", "top_k"): SHARED_RANKS,
    ("moge", "moge"): layers.MOGE,
}


def measured():
    """Of each case: elements sent to every rank in dispatch and in combine, and this rank's
    choices `[T, E]`."""
    gloo.parallel(expert_model_parallel_size=RANKS)
    found = {}
    for (dispatcher, router), moe in CASES.items():
        layer = layers.build(
            replace(moe, dispatcher=dispatcher),
            ParallelConfig(expert_model_parallel_size=RANKS),
        )
        torch.manual_seed(dist.get_rank())
        hidden = torch.randn(TOKENS, 1, layers.HIDDEN, dtype=torch.float64)
        weights, chosen = layer.route(hidden)
        stages = layer.token_dispatcher
        with traffic.watch() as outwards:
            record, *sent = stages.dispatch_preprocess(hidden, chosen, weights)
            received = stages.token_dispatch(record, *sent)
            rows = stages.dispatch_postprocess(record, *received)[0]
        with traffic.watch() as back:
            output = stages.token_combine(record, stages.combine_preprocess(record, rows))
            stages.combine_postprocess(record, output)
        found[dispatcher, router] = outwards.sent(), back.sent(), chosen
    return found


def expected(dispatcher, chosen_TRX):
    """Tokens that go to each rank, and numbers beside them, by the formulas."""
    choices = chosen_TRX.sum(dim=(0, 2))
    everyone = torch.full((RANKS,), TOKENS)
    if dispatcher == "alltoall":
        return choices, choices  # weights
    if dispatcher == "deduplicated":
        return chosen_TRX.any(dim=2).sum(dim=0), 2 * choices
    per_token = HERE if dispatcher == "allgather" else 2 * layers.MOGE.top_k // RANKS
    return everyone, per_token * everyone


@pytest.mark.distributed
def test_rows_and_the_numbers_beside_them_are_as_many_as_documented():
    every_rank = gloo.run(RANKS, measured)
    for rank, found in enumerate(every_rank):
        assert found.keys() == CASES.keys()
        for (dispatcher, router), (outwards, back, _) in found.items():
            tables = [r[dispatcher, router][2].unflatten(1, (RANKS, HERE)) for r in every_rank]
            tokens, numbers = expected(dispatcher, tables[rank])
            tokens, numbers = tokens.clone(), numbers.clone()
            tokens[rank] = numbers[rank] = 0
            assert torch.equal(outwards, tokens * layers.HIDDEN + numbers), dispatcher
            # What a rank returns is what it was sent.
            came = [expected(dispatcher, table)[0][rank] for table in tables]
            returned = torch.stack(came) * layers.HIDDEN
            returned[rank] = 0
            assert torch.equal(back, returned), dispatcher
