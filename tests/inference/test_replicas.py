"""Replicas with experts on each other's ranks, which decode different requests."""

import gloo
import pytest
import torch.distributed as dist
from tiny_models import KINDS, TINY, build, decode, prompts

from configs.compose import load
from pangu.inference.batching import Request
from pangu.inference.sampling import Sampling

PROMPTS = prompts(5, seed=8)
DEPTHS = ["model.mtp_num_layers=2"]


def requests(rank):
    """Rank 0 has four, rank 1 one, which ends long before the others."""
    part = PROMPTS[:4] if rank == 0 else PROMPTS[4:]
    return [
        Request(prompt, 6 if rank else 14 + n, Sampling(temperature=0.0 if n % 2 else 0.8, seed=n))
        for n, prompt in enumerate(part)
    ]


def engine(model, replica=None):
    from pangu.inference.engine import Engine

    options = {"vocab_size": 64, "cache_tokens": 256, "page_size": 4, "replica": replica}
    return Engine(model, max_batch_tokens=16, **options)


def decoded(world_size):
    """This rank's requests, plain and with guesses of the model's own layers."""
    from pangu.engines.megatron import process_groups
    from pangu.inference.replicas import Replica
    from pangu.model.build import build_model

    layout = ["parallel.expert_model_parallel_size=2", f"launch.processes={world_size}"]
    config = load([*TINY, *KINDS["mla"], *DEPTHS, *layout])
    process_groups.initialize(config)
    model = build_model(config)[0][0].eval()
    found = []
    for guesses in (False, True):
        replica = Replica(config)
        made = engine(model, replica)
        if guesses:
            made.draft_by_itself()
            made.branch_drafts()
        rank = dist.get_rank()
        found.append([])
        numbers = [made.add(request) for request in requests(rank)]
        tokens = {number: [] for number in numbers}
        for _ in range(24):  # the same steps everywhere, with work or without
            for update in made.step():
                tokens[update.number] += update.tokens
            replica.rest()
        assert not made.busy
        found[-1] = list(tokens.values())
    gloo.drop_groups()
    return found


@pytest.mark.distributed
def test_replicas_with_more_and_less_to_do_decode_what_one_process_does():
    model = build(*KINDS["mla"], *DEPTHS)
    expected = [decode(engine(model), requests(rank)) for rank in range(2)]
    assert gloo.run(2, decoded, 2) == [[one, one] for one in expected]
