"""What of an MoE layer's messages its own computing hides: by hand, and line by line of a bill."""

from dataclasses import replace

import pytest

from configs.compose import load
from simulator.collectives import collective_seconds
from simulator.hardware import load_hardware
from simulator.layer_overlap import Beside, hidden
from simulator.layout import from_config
from simulator.parts import prepare
from simulator.predict import predict

PLAN = ["model=pangu_pro_moe", "hardware=ascend_910b_376t", "devices=64", "moe=moge"]
PLAN += ["train.seq_length=4096", "train.global_batch_size=64"]
PLAN += ["hardware.overlap.exchange=1", "parallel.expert_model_parallel_size=8"]
LINKS = ("moe.dispatch", "moe.combine", "moe.dispatch between nodes", "moe.combine between nodes")
GATHERED = ("moe.permute", "moe.unpermute")


def test_messages_and_computing_of_four_chunks_by_hand():
    # There 2 s each, back 3 s each.
    beside = Beside(ends=1.0, first=1.5, middle=4.0, last=2.0)
    there, back = hidden(8.0, 12.0, beside, 4)
    # 1 beside the ends, then 1.5; twice 2 and 2 of 3 beside 4; then 2; nothing beside the last 3.
    assert there == 1.0 + 1.5 + 2 * 2.0
    assert back == 2 * 2.0 + 2.0
    exposed = (2 - 1) + (2 - 1.5) + 2 * (2 + 3 - 4) + (3 - 2) + 3
    assert 20.0 - there - back == exposed
    assert hidden(8.0, 12.0, beside, 2) == (1.0 + 1.5, 2.0)
    assert hidden(8.0, 12.0, beside, 1) == (1.0, 0.0)
    assert hidden(0.5, 12.0, beside, 1) == (0.5, 0.0)


def lines(*overrides):
    """Seconds and exposed seconds of an MoE layer's lines, by name and phase."""
    forecast = predict(load([*PLAN, *overrides]))
    of_layer = [entry.line for entry in forecast.bill if entry.block == "moe"]
    return {
        name: {(line.name, line.phase): float(getattr(line, name)) for line in of_layer}
        for name in ("seconds", "exposed")
    }, forecast


def expected(seconds, chunks, overlap, gathered):
    """Exposed seconds forward and backward, one line of the schedule after the other."""

    def work(start, phase):
        names = (start, *GATHERED) if gathered and start == "experts." else (start,)
        sorts = ("moe.sort", "moe.unsort") if start == "experts." else ()
        found = (s for (n, p), s in seconds.items() if p == phase and n.startswith(names + sorts))
        return sum(found)

    def message(name, phase):
        found = (
            s for (n, p), s in seconds.items() if p == phase and n in LINKS and n.startswith(name)
        )
        return sum(found) / chunks

    there, back = message("moe.dispatch", "forward"), message("moe.combine", "forward")
    experts = work("experts.", "forward") / chunks
    order = [(there, work("shared_expert.", "forward"))]
    order += [(there * (i + 1 < chunks) + back * (i > 0), experts) for i in range(chunks)]
    order += [(back, 0.0)]
    if chunks == 1:
        order[1] = (0.0, experts)
    forward = sum(max(0.0, m - c) for m, c in order)

    there = message("moe.dispatch", "input_gradient")
    back = message("moe.combine", "input_gradient")
    rows = work("experts.", "input_gradient") / chunks
    later = work("experts.", "weight_gradient") / chunks if overlap or chunks > 1 else 0.0
    shared = sum(work("shared_expert.", phase) for phase in ("input_gradient", "weight_gradient"))
    order = [(back, 0.0)]
    for i in reversed(range(chunks)):
        under_way = back * (i > 0) + there * (i + 1 < chunks)
        order.append((under_way, rows + later * (i + 1 < chunks)))
    order.append((there, shared + later))
    return forward, sum(max(0.0, m - c) for m, c in order)


@pytest.mark.parametrize("dispatcher", ["moge", "alltoall", "hierarchical"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_bill_shows_what_outlasts_computing(dispatcher, chunks, overlap):
    more = [f"moe.dispatcher={dispatcher}", f"moe.dispatch_chunks={chunks}"]
    more += [f"parallel.overlap_expert_parallel={str(overlap).lower()}"]
    more += ["parallel.expert_model_parallel_size=16", "moe.num_expert_groups=16", "moe.top_k=16"]
    found, forecast = lines(*more)
    shown = [
        sum(s for (n, p), s in found["exposed"].items() if p == phase and n in LINKS)
        for phase in ("forward", "input_gradient")
    ]
    by_hand = expected(found["seconds"], chunks, overlap, dispatcher == "moge")
    assert shown == pytest.approx(by_hand, rel=1e-9)
    inside = sum(found["seconds"].values()) - sum(found["exposed"].values())
    layers = next(entry.count for entry in forecast.bill if entry.block == "moe")
    assert forecast.num_microbatches == 1
    assert forecast.expert_messages.beside_layer == pytest.approx(layers * inside)


@pytest.mark.parametrize(
    "overrides",
    [
        ["simulation.layer_overlap=false"],
        ["hardware.overlap.exchange=0"],
        ["memory=selective", "memory.recompute_modules=[moe_permute]"],
        ["hardware.backend=cpu", "hardware.devices_per_node=64"],  # one host: no link between
    ],
    ids=str,
)
def test_nothing_is_hidden(overrides):
    found, forecast = lines("moe.dispatcher=moge", *overrides)
    assert found["seconds"][("moe.dispatch", "forward")] > 0
    for name in LINKS:
        for phase in ("forward", "input_gradient"):
            key = (name, phase)
            assert found["exposed"].get(key) == found["seconds"].get(key)
    assert forecast.expert_messages.beside_layer == 0


def test_two_micro_batches_hide_what_a_layer_left_and_no_more_than_machines_do():
    more = ["moe.dispatcher=moge", "train.global_batch_size=1024"]
    more += ["parallel.overlap_expert_parallel=true", "hardware.overlap.exchange=0.4"]
    alone = predict(load([*PLAN, *more, "simulation.layer_overlap=false"])).expert_messages
    both = predict(load([*PLAN, *more])).expert_messages
    assert alone.beside_layer == 0
    assert both.beside_layer > 0
    # Of 16 micro-batches 15 have another beside them.
    assert alone.beside_micro_batch == pytest.approx(0.4 * 15 / 16 * alone.seconds)
    assert both.beside_micro_batch == pytest.approx(
        15 / 16 * (0.4 * both.seconds - both.beside_layer)
    )


def test_chunks_send_the_same_in_more_messages_and_keep_the_same():
    hardware = load_hardware(load(PLAN).hardware)
    found, four = lines("moe.dispatcher=moge", "moe.dispatch_chunks=4")
    _, one = lines("moe.dispatcher=moge")

    def sent(forecast):
        lines = [e.line for e in forecast.bill if e.line.name in LINKS]
        return {(line.name, line.phase): float(line.bytes) for line in lines}

    assert sent(four) == pytest.approx(sent(one))
    for (name, phase), size in sent(four).items():
        there = (name == "moe.dispatch") == (phase == "forward")
        kind = "all_gather" if there else "reduce_scatter"
        each = float(collective_seconds(hardware, kind, size / 4, 8, 1))
        assert found["seconds"][name, phase] == pytest.approx(4 * each)
    memory = four.stages[0].memory, one.stages[0].memory
    assert memory[0].activations == pytest.approx(memory[1].activations)


def test_gradients_of_fewer_rows_are_in_memory_at_once():
    """MoGE with K choices of width H: of N rows in C chunks N/C are computed, and of two more
    chunks what is sent and what arrives are under way."""
    config = load([*PLAN, "moe.dispatcher=moge"])

    def peak(chunks):
        parts = prepare(
            replace(config, moe=replace(config.moe, dispatch_chunks=chunks)), from_config(config)
        )
        return float(parts.blocks.moe.backward_peak)

    model, moe, tokens = config.model, config.moe, config.train.seq_length
    stream = 2 * tokens * model.hidden_size
    rows = stream * moe.top_k
    computed = rows + 2 * tokens * moe.top_k * 3 * model.moe_ffn_hidden_size
    assert peak(1) == computed + 2 * stream
    assert peak(2) == (computed + 2 * rows) / 2 + 2 * stream
    assert peak(8) == (computed + 4 * rows) / 8 + 2 * stream
