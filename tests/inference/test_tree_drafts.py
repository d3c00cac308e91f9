"""Drafts that branch are verified in one pass, and the text stays that of plain decoding."""

import itertools

import gloo
import pytest
import torch
from test_leap_drafts import leaping
from test_speculative import PROMPTS, SMALLER, make, requests
from tiny_models import KINDS, TINY, build, decode, whole_forward

from pangu.inference import tree
from pangu.inference.cache import KeyValues
from pangu.inference.cached_pass import CachedPass, Segment
from pangu.inference.forward import Forward
from pangu.inference.tree import Accuracies, depths, grown, seen


def branching(model, draft, tokens=6, **settings):
    engine = make(model, draft, tokens, **settings)
    engine.draft_tokens = tokens
    engine.branch_drafts()
    return engine


@pytest.mark.parametrize("kind", ["moge", "top_k", "dense", "mla", "learned"])
@pytest.mark.parametrize("draft", ["ngram", "model", "layers", "leaps"])
def test_the_text_is_that_of_plain_decoding(kind, draft):
    """Whoever guesses, heads of random numbers too; greedy, and sampled with the same seed."""
    model = {
        "ngram": lambda: build(*KINDS[kind]),
        "model": lambda: build(*KINDS[kind]),
        "layers": lambda: build(*KINDS[kind], "model.mtp_num_layers=2"),
        "leaps": lambda: leaping(kind, 3, 2),
    }[draft]()
    small = {"ngram": "ngram", "model": None, "layers": "mtp", "leaps": "mtp"}[draft]
    small = small or build(*KINDS[kind], *SMALLER, "seed=7")
    for temperature in (0, 0.8):
        expected = decode(make(model), requests(temperature))
        engine = branching(model, small)
        assert decode(engine, requests(temperature)) == expected
        assert engine.counts.guessed[0] > 0
        assert engine.scheduler.pool.used == 0
    crowded = {"cache_tokens": 68, "max_batch_tokens": 7, "max_sequences": 4}
    engine = branching(model, small, **crowded)
    assert decode(engine, requests(0)) == decode(make(model), requests(0))


def test_branches_that_hold_are_kept():
    """A draft model that is the model itself, its guesses put second: only branches hold."""
    model = build()
    engine = branching(model, model)
    expected = decode(make(model), requests(0))
    propose = engine.drafter.propose

    def second(counts):
        found = propose(counts)
        for draft in found.values():
            for place in draft.candidates:
                place[0], place[1] = place[1], place[0]
        return found

    engine.drafter.propose = second
    assert decode(engine, requests(0)) == expected
    assert engine.counts.held[0] > 0.9 * engine.counts.guessed[0]


@pytest.mark.parametrize("kind", ["moge", "mla"])
def test_each_node_sees_its_own_branch_alone(kind):
    """Logits of a tree in one pass are those of whole passes over each branch."""
    model = build(*KINDS[kind], "moe.top_k=8", "moe.num_expert_groups=1")
    text, nodes, parents = [5, 9, 2, 11], [3, 7, 3, 20, 1, 8], [-1, -1, 0, 0, 1, 3]
    store = KeyValues(32)
    segment = Segment(0, 10, [0, 1, 2, 3], parents)
    cached = CachedPass(store, 4, [segment], list(range(3, 10)))
    found = Forward(model)([*text, *nodes], cached)
    for node in range(-1, 6):
        branch, at = [], node
        while at >= 0:
            branch.insert(0, nodes[at])
            at = parents[at]
        expected = whole_forward(model, [*text, *branch])[-1]
        assert torch.allclose(found[node + 1], expected, atol=1e-4)


def test_ancestors_are_seen():
    parents = [-1, 0, 0, 2, -1, 3]
    assert depths(parents) == [1, 2, 2, 3, 1, 4]
    expected = [{0}, {0, 1}, {0, 2}, {0, 2, 3}, {4}, {0, 2, 3, 5}]
    assert [set(row.nonzero().flatten().tolist()) for row in seen(parents)] == expected


def probability(known, path):
    found = 1.0
    for depth, rank in enumerate(path, start=1):
        found *= known.of(depth, rank)
    return found


@pytest.mark.parametrize("independent", [True, False])
def test_the_tree_has_the_most_probable_paths(independent):
    known = Accuracies()
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        candidates = [[0, 1, 2, 3]] * 3
        known.saw(candidates, torch.randint(6, (3,), generator=generator).tolist(), independent)
    shape = known.tree(9, 3, independent)
    paths = []
    for _, rank, parent in shape:
        paths.append([*(paths[parent] if parent >= 0 else []), rank])
    every = [
        path
        for length in (1, 2, 3)
        for path in itertools.product(range(tree.WIDTH), repeat=length)
        if independent or not any(path[:-1])
    ]
    best = sorted((probability(known, path) for path in every), reverse=True)[:9]
    found = sorted((probability(known, path) for path in paths), reverse=True)
    assert found == pytest.approx(best)
    tokens, parents = grown(shape, [[10, 11, 12, 13], [20, 21]])
    assert len(tokens) == len(parents) < 9  # no candidates of a third place, two of the second
    assert all(parent < node for node, parent in enumerate(parents))


def test_accuracies_are_those_counted():
    known = Accuracies()
    for token in (1, 1, 2, 9):
        known.saw([[1, 2], [5, 6]], [token, 6], independent=False)
    assert known._right == {(1, 0): 2, (1, 1): 1, (2, 1): 2}
    assert known._asked == {1: 4, 2: 2}  # behind another than the likeliest nothing is known


def decoded_in_parts(world_size):
    """What two ranks decode with everybody's guesses, in a row and as trees: by kind of model,
    whose guesses, whether they branch and temperature. In a row only looked-up guesses are not
    drawn, and leave a seed's text what it is."""
    from megatron.core import parallel_state

    from configs.compose import load
    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model

    found = {}
    for kind in ("moge", "top_k", "mla"):
        layout = ["parallel.expert_model_parallel_size=2", f"launch.processes={world_size}"]
        shape = [*TINY, *KINDS[kind], *layout]
        process_groups.initialize(load(shape))

        def model(*overrides, shape=shape):
            return build_model(load([*shape, *overrides]))[0][0].eval()

        plain, small = model(), model(*SMALLER, "seed=7", "parallel.expert_model_parallel_size=1")
        guessing = {
            "ngram": (plain, "ngram"),
            "model": (plain, small),
            "layers": (model("model.mtp_num_layers=2"), "mtp"),
            "leaps": (model("model.leap_heads=3"), "mtp"),
        }
        for (who, (target, draft)), branch, temperature in itertools.product(
            guessing.items(), (False, True), (0, 0.8)
        ):
            if temperature == 0 or (kind == "moge" and (branch or who == "ngram")):
                engine = (branching if branch else make)(target, draft)
                texts = decode(engine, requests(temperature, PROMPTS[:3]))
                assert engine.counts.guessed[0] > 0
                found[kind, who, branch, temperature] = texts
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_two_expert_parallel_processes_decode_as_one_does():
    one, other = gloo.run(2, decoded_in_parts, 2)
    assert one == other
    assert len(one) == 3 * 8 + 5
    own = {"layers": ["model.mtp_num_layers=2"], "leaps": ["model.leap_heads=3"]}
    plain = {}
    for (kind, who, branch, temperature), texts in one.items():
        overrides = tuple(own.get(who, ()))
        key = kind, overrides, temperature
        if key not in plain:
            some = requests(temperature, PROMPTS[:3])
            plain[key] = decode(make(build(*KINDS[kind], *overrides)), some)
        assert texts == plain[key], (kind, who, branch, temperature)


def test_what_a_tree_brings_is_what_its_paths_bring_on_average():
    """Tokens at random, right as often as is believed; a node counts where all before it do."""
    believed = Accuracies()
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([believed.of(1, rank) for rank in range(tree.WIDTH)])
    shape = believed.tree(7, 3, independent=True)
    # Which candidate is right at each depth, if any: 4 stands for none.
    wanted = torch.cat([chances, 1 - chances.sum(0, keepdim=True)])
    right = torch.multinomial(wanted.expand(20_000 * 3, -1), 1, generator=generator)
    found = 0
    for ranks in right.view(-1, 3).tolist():
        held: set[int] = {-1}
        for node, (depth, rank, parent) in enumerate(shape):
            if parent in held and ranks[depth - 1] == rank:
                held.add(node)
        found += len(held)  # the model's own token, and those that held
    assert believed.expected(7, 3, True) == pytest.approx(found / 20_000, rel=0.02)
