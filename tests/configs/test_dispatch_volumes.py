"""How much each dispatcher sends, by the published formulas and as the simulator counts it; and
which one `auto` takes."""

import numpy as np
import pytest

from configs.compose import load
from configs.dispatch import explained, ranks_reached, resolved, volume
from configs.schema import MoEConfig
from simulator.counts.moe import moe as count_layer
from simulator.counts.records import shapes
from simulator.layout import from_config

TOP_8 = MoEConfig(router="top_k", top_k=8)
MOGE = MoEConfig(router="moge", top_k=8, num_expert_groups=8)
EP = "parallel.expert_model_parallel_size"


@pytest.mark.parametrize(("nodes", "ranks"), [(4, 8), (2, 2), (8, 8), (1, 8)])
def test_volumes_are_those_of_the_reference(nodes, ranks):
    """Per rank and token: k(E-1)/E between nodes and (k/E)(t-1)/t inside for an exchange of rows,
    E-1 and k(t-1)/t for Pangu Ultra's hierarchy, with E nodes of t ranks."""
    k, e, t = 8, nodes, ranks
    flat = volume("alltoall", TOP_8, e * t, 1, t)
    assert flat.between == pytest.approx(k * (e - 1) / e)
    assert flat.inside == pytest.approx(k / e * (t - 1) / t)
    two_levels = volume("hierarchical", TOP_8, e * t, 1, t)
    assert two_levels.between == e - 1
    assert two_levels.inside == pytest.approx(k * (t - 1) / t)
    once = volume("deduplicated", TOP_8, e * t, 1, t)
    share = ranks_reached(TOP_8, e * t) / k
    assert (once.between, once.inside) == pytest.approx((flat.between * share, flat.inside * share))


def test_ranks_reached_are_those_of_random_choices():
    random = np.random.default_rng(1)
    experts = random.random((20_000, 64)).argsort(axis=1)[:, :8]
    # Choices without repetition reach a little farther than even ones with.
    assert ranks_reached(TOP_8, 4) == pytest.approx(_ranks(experts, 4), rel=0.03)
    groups = random.random((20_000, 8, 8)).argsort(axis=2)[:, :, :1] + 8 * np.arange(8)[:, None]
    for ranks in (4, 8, 16):
        expected = _ranks(groups.reshape(20_000, 8), ranks)
        assert ranks_reached(MOGE, ranks) == pytest.approx(expected, rel=1e-12)


def _ranks(experts, count):
    """Mean number of ranks that hold a token's experts, of 64."""
    reached = np.zeros((len(experts), count), dtype=bool)
    np.put_along_axis(reached, experts // (64 // count), True, axis=1)
    return reached.sum(axis=1).mean()


@pytest.mark.parametrize("groups", [1, 8, 32])
@pytest.mark.parametrize("kind", ["alltoall", "deduplicated", "hierarchical"])
def test_the_simulator_counts_the_same_volumes(kind, groups):
    nodes, node = 4, 8
    plan = ["moe=moge", "model.num_experts=64", "moe.top_k=32", f"moe.num_expert_groups={groups}"]
    plan += ["hardware=ascend_910b_280t", f"devices={nodes * node}", f"{EP}={nodes * node}"]
    config = load([*plan, f"moe.dispatcher={kind}"])
    counted = shapes(config, from_config(config))
    token = counted.shard * config.model.hidden_size * counted.element
    between = inside = 0.0
    for message in count_layer(counted).messages:
        if message.phase != "forward" or not message.name.startswith("moe.dispatch"):
            continue
        if not np.any(message.count) or "within" in message.name:
            continue
        if message.kind == "all_to_all":  # of which each part goes to another rank, one stays
            ranks = nodes * node if message.ranks is None else int(message.ranks)
            here = min(node, ranks)
            inside += float(message.bytes) * (here - 1) / ranks
            between += float(message.bytes) * (ranks - here) / ranks
        else:
            between += float(message.bytes) * (nodes - 1) / nodes
    expected = volume(kind, config.moe, nodes * node, 1, node)
    assert between == pytest.approx(expected.between * float(token))
    assert inside == pytest.approx(expected.inside * float(token))


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["moe=moge", "moe.top_k=4", "moe.num_expert_groups=4", "launch.nodes=1"], "moge"),
        (["moe=moge", "moe.top_k=4", "moe.num_expert_groups=4", "launch.nodes=2"], "hierarchical"),
        (["moe=top_k", "moe.top_k=4", "launch.nodes=1"], "allgather"),
        (["moe=top_k", "moe.top_k=4", "launch.nodes=2"], "hierarchical"),
        (["moe=top_k", "moe.top_k=8", "launch.nodes=2"], "hierarchical"),
        (["moe=top_k", "moe.top_k=1", "launch.nodes=2"], "alltoall"),
        (["moe=top_k", "moe.top_k=2", "launch.nodes=4"], "deduplicated"),
    ],
)
def test_auto_knows_nodes_and_says_so(overrides, kind):
    nodes = int(overrides[-1].partition("=")[2])
    config = load([*overrides, f"launch.processes={4 // nodes}", f"{EP}=4"])
    assert resolved(config) == kind
    said = explained(config)
    assert f"takes {kind} over 4 ranks" in said
    assert (f"on {nodes} nodes" in said) == (nodes > 1)


def test_a_slow_link_between_nodes_moves_auto():
    """Pangu Ultra: 32 ranks on 4 nodes. Where all links are alike there is no need of hierarchy."""
    plan = ["model=pangu_ultra_moe", "hardware=ascend_910b_280t", "devices=32", f"{EP}=32"]
    assert resolved(load(plan)) == "hierarchical"
    alike = load(plan)
    fast = alike.hardware["links"][0] | {"devices": 0}
    alike.hardware["links"] = [fast]
    assert resolved(alike) != "hierarchical"
