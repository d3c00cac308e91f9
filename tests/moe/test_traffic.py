"""How much each dispatcher sends, in the numbers that its documentation and the reference give."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
import torch.distributed as dist
import traffic

from configs.schema import ParallelConfig

TOKENS, RANKS, PER_NODE = 24, 4, 2
NODES = RANKS // PER_NODE
HERE = layers.EXPERTS // RANKS
SHARED_RANKS = replace(layers.TOP_K, top_k=4)
CASES = {
    ("alltoall", "top_k"): SHARED_RANKS,
    ("deduplicated", "top_k"): SHARED_RANKS,
    ("deduplicated", "expert_choice"): replace(SHARED_RANKS, router="expert_choice"),
    ("allgather", "top_k"): SHARED_RANKS,
    ("moge", "moge"): layers.MOGE,
    ("hierarchical", "top_k"): SHARED_RANKS,
    ("hierarchical", "expert_choice"): replace(SHARED_RANKS, router="expert_choice"),
    ("hierarchical", "moge"): layers.MOGE,
    ("hierarchical", "whole groups per node"): replace(layers.MOGE, num_expert_groups=2),
}


def measured():
    """Of each case: elements sent to every rank in dispatch and in combine, and this rank's
    choices `[T, E]`."""
    gloo.parallel(ranks_per_node=PER_NODE, expert_model_parallel_size=RANKS)
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


def expected(dispatcher, router, tables, rank):
    """Tokens that go from a rank to each rank, and numbers beside them, by the formulas. Of each
    rank, `tables` has the choices `[T, ranks, experts of a rank]`."""
    if dispatcher == "hierarchical":
        return between_nodes(router, rank) + inside_the_node(router, tables, rank)
    chosen_TRX = tables[rank]
    choices = chosen_TRX.sum(dim=(0, 2))
    everyone = torch.full((RANKS,), TOKENS)
    if dispatcher == "alltoall":
        return choices, choices  # weights
    if dispatcher == "deduplicated":
        return chosen_TRX.any(dim=2).sum(dim=0), 2 * choices
    per_token = HERE if dispatcher == "allgather" else 2 * layers.MOGE.top_k // RANKS
    return everyone, per_token * everyone


def between_nodes(router, rank):
    """All tokens to the same place of each other node, and their choices."""
    same_place = (torch.arange(RANKS) % PER_NODE == rank % PER_NODE).long()
    wide = layers.EXPERTS if router == "expert_choice" else 2 * CASES["alltoall", "top_k"].top_k
    return torch.stack([TOKENS * same_place, TOKENS * wide * same_place])


def inside_the_node(router, tables, rank):
    """Of the tokens of this place of every node: rows to each rank of this node."""
    node = torch.arange(RANKS) // PER_NODE == rank // PER_NODE
    gathered = torch.cat([tables[i] for i in range(rank % PER_NODE, RANKS, PER_NODE)])
    if router == "moge":
        everyone = TOKENS * NODES * node.long()
        return torch.stack([everyone, 2 * layers.MOGE.top_k // RANKS * everyone])
    choices = gathered.sum(dim=(0, 2)) * node
    return torch.stack([choices, choices])


@pytest.mark.distributed
def test_rows_and_the_numbers_beside_them_are_as_many_as_documented():
    every_rank = gloo.run(RANKS, measured)
    for rank, found in enumerate(every_rank):
        assert found.keys() == CASES.keys()
        for (dispatcher, router), (outwards, back, _) in found.items():
            tables = [r[dispatcher, router][2].unflatten(1, (RANKS, HERE)) for r in every_rank]
            tokens, numbers = map(torch.clone, expected(dispatcher, router, tables, rank))
            tokens[rank] = numbers[rank] = 0
            assert torch.equal(outwards, tokens * layers.HIDDEN + numbers), (dispatcher, router)
            # What a rank returns is what it was sent.
            came = [expected(dispatcher, router, tables, i)[0][rank] for i in range(RANKS)]
            returned = torch.stack(came) * layers.HIDDEN
            returned[rank] = 0
            assert torch.equal(back, returned), (dispatcher, router)
