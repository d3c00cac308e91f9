"""A forward pass beside a backward pass: losses and gradients are those of one after the other."""

import gloo
import pytest
import torch
import torch.distributed as dist
from layouts import all_layouts
from test_recompute import MODEL

from configs import check
from pangu.backends import turns

OVERLAP = "parallel.overlap_expert_parallel=true"
EP2 = "parallel.expert_model_parallel_size=2"
SELECTIVE = "memory=selective"
LAYOUTS = {
    "moge": [EP2, "moe.dispatcher=moge", "moe.aux_loss_scope=global_batch", "memory=full"],
    "tensor parallel": [
        EP2,
        "parallel.tensor_model_parallel_size=2",
        "moe.dispatcher=allgather",
        SELECTIVE,
        "memory.recompute_modules=[layernorm,mla_up_proj,moe_permute]",
    ],
    "swapped": [
        EP2,
        "moe=top_k",
        "moe.dispatcher=deduplicated",
        "memory.swap=[core_attn,mla_up_proj,mlp,moe]",
        "train.seq_length=128",
    ],
    "sliced experts": [
        "parallel.expert_tensor_parallel_size=2",
        "moe=top_k",
        "moe.dispatcher=alltoall",
        SELECTIVE,
        "memory.recompute_modules=[moe]",
        "memory.swap=[core_attn,mlp]",
        "train.seq_length=128",
    ],
    "nodes": [EP2, "moe=top_k", "moe.dispatcher=hierarchical", "launch.nodes=2"],
}


def through_gloo():
    """Sums of two passes' own values, over a group that does not share memory."""
    from pangu.moe.dispatch.messages import gather, reduce_scatter, travelled

    group = dist.new_group(group_desc="EXPERT_MODEL_PARALLEL_GROUP")
    type(group).serves = lambda *_: False
    order = []

    def work(name, value):
        mine = torch.full((4, 32), float(value + dist.get_rank()))
        whole = travelled(mine, reduce_scatter(group))
        order.append(name)
        every = travelled(mine, gather(group))
        order.append(name)
        counts = mine.long()
        dist.all_reduce(counts, group=group)  # no turn changes
        order.append(name)
        return whole.unique().tolist(), every.unique().tolist(), counts.unique().tolist()

    results = turns.side_by_side(lambda: work("a", 1), lambda: work("b", 10))
    return results, order


def with_and_without():
    """Steps of each layout, of each with overlap, and of the latter how many turns went over."""
    given = {name: [*MODEL, "train.global_batch_size=4", *o] for name, o in LAYOUTS.items()}
    given["nodes"].append("launch.processes=1")
    plain = all_layouts(given, 2, 2)
    count, found = [], {}
    hand_over = turns.hand_over

    def counted():
        count.append(1)
        hand_over()

    turns.hand_over = counted
    for name, overrides in given.items():
        count.clear()
        found[name] = all_layouts({"": [*overrides, OVERLAP]}, 2, 2)[""], len(count)
    turns.hand_over = hand_over
    return plain, found, through_gloo()


@pytest.mark.distributed
def test_overlapped_steps_equal_those_without_and_messages_are_under_way_together():
    (plain, found, sums), (_, _, others) = gloo.run(2, with_and_without)
    for name, expected in plain.items():
        steps, handed_over = found[name]
        assert steps == expected, name
        assert handed_over >= 2 * 2 * 2, name  # steps, passes, ways to experts and back
    for results, order in (sums, others):
        assert results == (([3.0], [1.0, 2.0], [3]), ([21.0], [10.0, 11.0], [21]))
        assert order == ["a", "b", "a", "a", "b", "b"]


def calls():
    """What two passes do, in order."""
    done = []

    def work(name, count):
        for number in range(count):
            done.append(f"{name}{number}")
            turns.hand_over()
        return name

    results = turns.side_by_side(lambda: work("a", 2), lambda: work("b", 4))
    return results, done


def test_passes_alternate_and_the_longer_one_ends_alone():
    assert calls() == (("a", "b"), ["a0", "b0", "a1", "b1", "b2", "b3"])
    turns.hand_over()  # of nobody


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_pass_that_fails_ends_the_other(guilty):
    reached = []

    def fail():
        turns.hand_over()
        raise KeyError("mine")

    def go_on():
        for number in range(5):
            reached.append(number)
            turns.hand_over()

    passes = [go_on, go_on]
    passes[guilty] = fail
    with pytest.raises(KeyError, match="mine"):
        turns.side_by_side(*passes)
    assert len(reached) < 3
    assert calls()[0] == ("a", "b")


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [(["parallel.pipeline_model_parallel_size=2"], "parallel.pipeline_model_parallel_size=1")],
)
def test_where_passes_cannot_overlap_is_said(overrides, hint):
    given = ["model=moge_tiny", "launch.processes=2", OVERLAP, *overrides]
    _, found = check.examine(given, alone=True)
    assert any(hint in str(violation) and "overlap_expert" in str(violation) for violation in found)
