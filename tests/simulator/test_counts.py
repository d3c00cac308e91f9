"""Operators and messages of a layer against counts done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from configs.compose import load
from simulator.counts.attention import attention
from simulator.counts.dispatch import distinct_nodes
from simulator.counts.layer import blocks, layer
from simulator.counts.moe import moe
from simulator.counts.records import Counts, shapes
from simulator.layout import Layout, from_config
from simulator.parameters import model_flops_per_token
from simulator.predict import predict


def counted(kind: str, *overrides: str) -> Counts:
    config = load(list(overrides))
    return layer(shapes(config, from_config(config)), kind)  # type: ignore[arg-type]


def flops(counts: Counts, phase: str) -> float:
    return sum(float(op.flops) for op in counts.operators if op.phase == phase)


@pytest.mark.parametrize(
    "model", ["pangu_pro_moe", "deepseek_v3", "mixtral_8x7b", "pangu_ultra_dense"]
)
def test_flops_of_the_parts_are_the_models(model):
    """Forward and both gradients of every block sum to the model FLOPs (attention: four of the
    seven products are model FLOPs, fused backward recomputes the scores)."""
    config = load([f"model={model}", "train.seq_length=4096", "devices=1"])
    s = shapes(config, from_config(config))
    counted = blocks(s)
    dense = config.model.num_dense_layers if config.model.num_experts else config.model.num_layers
    layers = {
        "dense": dense,
        "moe": config.model.num_layers - dense,
        "mtp": 1,
        "head": 1,
        "embedding": 1,
    }
    total = 0.0
    for name, count in layers.items():
        block = getattr(counted, name)
        for op in block.operators if block and count else []:
            recomputed = 0.0
            if op.kind == "attention" and op.phase == "input_gradient":
                shape = op.shape
                recomputed = 4096.0**2 * shape["heads"] * shape["qk_dim"]
            total += count * (float(op.flops) - recomputed)
    assert total / 4096 == pytest.approx(model_flops_per_token(config), rel=1e-6)


def test_tensor_parallel_messages_of_a_dense_layer():
    """Sequence parallelism: 4 gathers/reductions forward, 4 backward and 2 gathers again, each of
    tokens x hidden; without it, 2 all-reduces each way."""
    plan = ("model=pangu_ultra_dense", "devices=8", "train.seq_length=4096")
    plan += ("parallel.tensor_model_parallel_size=8",)
    size = 4096 * 12288 * 2
    with_sp = [m for m in counted("dense", *plan).messages if m.group == "tp" and m.count]
    assert [float(m.bytes) for m in with_sp] == [size] * 10
    assert sum(m.phase == "forward" for m in with_sp) == 4
    without = counted("dense", *plan, "parallel.sequence_parallel=false").messages
    kinds = [m.kind for m in without if m.group == "tp" and m.count]
    assert kinds == ["all_reduce"] * 4


def test_expert_exchange_sends_every_choice_once():
    plan = ("model=deepseek_v3", "devices=64", "train.seq_length=4096", "moe.dispatcher=alltoall")
    messages = counted("moe", *plan, "parallel.expert_model_parallel_size=64").messages
    exchange = [m for m in messages if m.kind == "all_to_all" and m.group == "ep"]
    assert [float(m.bytes) for m in exchange] == [4096 * 8 * 7168 * 2] * 4


def test_moge_gathers_each_token_once():
    plan = ("model=pangu_pro_moe", "devices=8", "train.seq_length=4096")
    messages = counted("moe", *plan, "parallel.expert_model_parallel_size=8").messages
    active = [m for m in messages if m.count and m.group in ("expert", "ep")]
    assert sorted(m.kind for m in active) == ["all_gather"] * 2 + ["reduce_scatter"] * 2
    assert all(float(m.bytes) == 8 * 4096 * 5120 * 2 for m in active)


def test_up_to_top_k_ranks_gather_each_token_once():
    """What `moe.dispatcher=auto` takes inside a node: at EP 8 = K as many bytes as an exchange of
    rows, at EP 2 a quarter; past K tokens travel once to each rank."""
    plan = ("model=qwen3_30b_a3b", "devices=16", "train.seq_length=4096")
    row = 4096 * 2048 * 2

    def moved(ep: int, *more: str) -> tuple[set, float]:
        sizes = f"parallel.expert_model_parallel_size={ep}"
        messages = counted("moe", *plan, sizes, *more).messages
        active = [m for m in messages if m.count and m.group in ("expert", "ep")]
        received = {float(m.bytes) * (ep - 1) / ep for m in active}
        assert len(active) == 4
        assert len(received) == 1
        return {m.kind for m in active}, received.pop()

    gather = {"all_gather", "reduce_scatter"}
    assert moved(2) == (gather, row)
    assert moved(8) == (gather, 7 * row)
    reached = 16 * (1 - (15 / 16) ** 8)
    kinds, received = moved(16)
    assert (kinds, received) == ({"all_to_all"}, pytest.approx(reached * row * 15 / 16))
    assert moved(2, "moe.dispatcher=alltoall") == ({"all_to_all"}, 4 * row)
    assert moved(8, "moe.dispatcher=alltoall") == ({"all_to_all"}, 7 * row)
    assert moved(2, "moe=expert_choice") == ({"all_to_all"}, 4 * row)


def test_hierarchical_dispatch_halves_traffic_between_nodes():
    """k/E = 8/4: flat k·T·(E-1)/E against (E-1)·T rows between nodes (arXiv 2505.04519)."""
    plan = ["model=pangu_ultra_moe", "devices=32", "train.seq_length=4096"]
    plan += ["parallel.tensor_model_parallel_size=8", "parallel.expert_model_parallel_size=32"]
    flat = counted("moe", *plan, "moe.dispatcher=alltoall").messages
    split = counted("moe", *plan, "moe.dispatcher=hierarchical").messages
    row = 7680 * 2
    rows = 4096 / 8
    one = next(m for m in flat if m.name == "moe.dispatch" and m.kind == "all_to_all")
    between = next(m for m in split if m.name == "moe.dispatch between nodes")
    inside = next(m for m in split if m.name == "moe.dispatch inside node")
    nodes = 4
    flat_between = float(one.bytes) * (nodes - 1) / nodes
    assert float(between.bytes) * (nodes - 1) / nodes == 3 * rows * row
    assert flat_between == 2 * 3 * rows * row
    assert (int(between.ranks), int(between.stride)) == (4, 8)
    assert (int(inside.ranks), float(inside.bytes)) == (8, 8 * rows * row)


def test_deduplicated_dispatch_reaches_the_allowed_nodes_only():
    config = load(["model=deepseek_v3", "devices=64"])
    s = shapes(config, from_config(config))
    assert float(distinct_nodes(s, 8)) == pytest.approx(4 * (1 - 0.75**8))
    config.moe.router = "top_k"
    assert float(distinct_nodes(s, 8)) == pytest.approx(8 * (1 - 0.875**8))


def test_deduplicated_dispatch_reaches_every_rank_once():
    """Of 8 even choices a token's experts lie on 16·(1 - (15/16)^8) of 16 ranks."""
    plan = ["model=deepseek_v3", "devices=16", "parallel.expert_model_parallel_size=16"]
    plan += ["moe.dispatcher=deduplicated", "train.seq_length=4096"]
    messages = [
        m
        for m in counted("moe", *plan).messages
        if m.group in ("ep", "etp", "expert") and np.any(m.count)
    ]
    assert {m.kind for m in messages} == {"all_to_all"}
    assert len(messages) == 4
    ranks = 16 * (1 - (15 / 16) ** 8)
    assert all(float(m.bytes) == pytest.approx(4096 * 7168 * 2 * ranks) for m in messages)


def test_sliced_experts_gather_a_token_once_where_it_is_sent_once():
    """With EP 1 and ETP 4 there is nowhere to send to, and each of 8 choices the same token."""
    plan = ["model=deepseek_v3", "devices=4", "parallel.tensor_model_parallel_size=4"]
    plan += ["parallel.expert_tensor_parallel_size=4", "train.seq_length=4096"]

    def gathered(dispatcher):
        messages = counted("moe", *plan, f"moe.dispatcher={dispatcher}").messages
        return {float(m.bytes) for m in messages if m.group == "etp" and np.any(m.count)}

    assert gathered("deduplicated") == {4096 * 7168 * 2}
    assert gathered("alltoall") == {8 * 4096 * 7168 * 2}


def test_a_rack_of_fast_links_is_one_domain():
    """64 ranks of a rack of 72 exchange rows without a hop between nodes of 4."""
    plan = ["model=deepseek_v3", "devices=64", "parallel.expert_model_parallel_size=64"]
    plan += [
        "moe.dispatcher=deduplicated",
        "simulation.node_forwarding=true",
        "train.seq_length=4096",
    ]
    for machine, nodes in (("gb200", 1), ("h100", 8)):
        messages = counted("moe", *plan, f"hardware={machine}").messages
        between = next(m for m in messages if m.name == "moe.dispatch between nodes")
        assert int(between.ranks) == nodes


def test_quantised_products_write_their_operands_twice():
    """Forward the input, backward the output's gradient: 2 bytes read, 1 + 1 written."""
    plan = ("model=pangu_ultra_dense", "devices=1", "train.seq_length=4096")
    assert not any("quantised" in op.name for op in counted("dense", *plan).operators)
    quantised = counted("dense", *plan, "backend.precision=fp8").operators
    forward, backward = (op for op in quantised if op.name == "mlp.fc2 quantised")
    assert float(forward.bytes) == 4 * 4096 * 28672
    assert float(backward.bytes) == 4 * 4096 * 12288


def test_experts_one_by_one_are_as_many_products():
    plan = ("model=mixtral_8x7b", "devices=1", "train.seq_length=4096")
    grouped = counted("moe", *plan)
    single = counted("moe", *plan, "simulation.grouped_experts=false")
    products = [op for op in single.operators if op.name == "experts.fc1"]
    assert [(op.kind, float(op.count)) for op in products] == [("matmul", 8)] * 3
    assert sum(float(op.flops * op.count) for op in products) == sum(
        float(op.flops) for op in grouped.operators if op.name == "experts.fc1"
    )


def test_padded_values_are_as_wide_as_keys():
    plan = ("model=deepseek_v3", "devices=1", "train.seq_length=4096")
    widths = [
        next(op for op in counts.operators if op.name == "attention.core").shape["v_dim"]
        for counts in (
            counted("moe", *plan),
            counted("moe", *plan, "simulation.padded_values=true"),
        )
    ]
    assert widths == [128, 192]


def test_context_parallelism_divides_the_scores():
    plan = ("model=pangu_ultra_dense", "devices=8", "train.seq_length=32768")
    alone = counted("dense", *plan)
    for kind in ("all_to_all", "ring"):
        cut = counted(
            "dense",
            *plan,
            "parallel.context_parallel_size=8",
            f"parallel.context_parallel_type={kind}",
        )
        assert flops(cut, "forward") == pytest.approx(flops(alone, "forward") / 8)
        used = [m for m in cut.messages if m.group == "cp" and m.count]
        assert {m.kind for m in used} == {"send_recv" if kind == "ring" else "all_to_all"}


def test_arrays_count_what_numbers_count():
    config = load(["model=deepseek_v3", "train.seq_length=4096"])
    tp = np.array([1, 2, 8])
    many = moe(shapes(config, Layout(tp=tp, ep=16, dp=64 // tp)))
    for index, size in enumerate(tp):
        one = moe(shapes(config, Layout(tp=int(size), ep=16, dp=64 // int(size))))
        for several, single in zip(many.operators, one.operators, strict=True):
            value = np.broadcast_to(several.flops, tp.shape)[index]
            assert value == pytest.approx(float(single.flops))
        for several, single in zip(many.messages, one.messages, strict=True):
            value = np.broadcast_to(several.bytes, tp.shape)[index]
            assert value == pytest.approx(float(single.bytes))


def test_fused_communication_hides_behind_its_product():
    plan = ["model=pangu_ultra_dense", "hardware=ascend_910b_376t", "devices=8"]
    plan += ["parallel.tensor_model_parallel_size=8", "train.seq_length=4096"]
    shown = predict(load(plan)).breakdown["tensor-parallel communication"]
    fused = predict(load([*plan, "simulation.tp_comm_overlap=true"]))
    assert fused.breakdown["tensor-parallel communication"] < 0.9 * shown


EXPERTS = ("model=mixtral_8x7b", "devices=8", "train.seq_length=4096")
EXPERTS += ("parallel.expert_model_parallel_size=8", "backend.precision=fp8")


def bytes_of(counts: Counts, name: str) -> list[float]:
    return [float(op.bytes) for op in counts.operators if op.name == name]


def test_bias_and_clamp_of_experts_take_passes_of_their_own():
    """Per element of the output, as megatron-core's `_apply_bias` reads and writes it: 12 bytes
    forward and 16 backward in 16 bits, 28 and 40 where the probabilities are float32."""
    plain = counted("moe", *EXPERTS)
    assert bytes_of(plain, "experts.bias") == bytes_of(plain, "experts.clamp") == []
    wanted = ("model.add_mlp_bias=true", "simulation.clamped_experts=true")
    elements = 4096 * 2 * 4096  # tokens x choices x hidden
    flat = counted("moe", *EXPERTS, *wanted)
    assert bytes_of(flat, "experts.bias") == [12 * elements, 16 * elements]
    once = counted(
        "moe", *EXPERTS, *wanted, "moe.dispatcher=deduplicated", "simulation.node_forwarding=true"
    )
    assert bytes_of(once, "experts.bias") == [28 * elements, 40 * elements]
    inner = 4096 * 2 * 2 * 14336 * 2  # gate and value, 2 bytes each
    assert bytes_of(flat, "experts.clamp") == [4 * inner, 5 * inner]


def test_padding_copies_every_row_there_and_back():
    assert bytes_of(counted("moe", *EXPERTS), "experts.padding") == []
    padded = counted("moe", *EXPERTS, "simulation.padded_experts=true")
    rows = 4096 * 2 * 4096 * 2  # bytes; in and out, read and written
    assert bytes_of(padded, "experts.padding") == [4 * rows, 4 * rows]


def test_fused_experts_leave_nothing_between_their_products():
    fused = counted("moe", *EXPERTS, "simulation.fused_experts=true")
    assert bytes_of(fused, "experts.activation") == []
    rows = 4096 * 2
    # only the input and, backward, the output's gradient are cast: 2 bytes read, 2 x 1 written
    assert bytes_of(fused, "experts.fc1 quantised") == [rows * 4096 * 4, 0]
    assert bytes_of(fused, "experts.fc2 quantised") == [0, rows * 4096 * 4]


def test_float8_attention_is_less_than_twice_as_fast():
    wide = ("model=mixtral_8x7b", "devices=1", "train.seq_length=32768", "hardware=h100")
    wide += ("backend.precision=fp8",)
    bill = [
        {
            line.line.phase: float(line.line.seconds)
            for line in predict(load([*wide, f"simulation.fp8_attention={on}"])).bill
            if line.line.name == "attention.core"
        }
        for on in ("false", "true")
    ]
    for phase in ("forward", "input_gradient"):
        assert bill[0][phase] / bill[1][phase] == pytest.approx(1.62, abs=0.02)


def test_exchange_of_heads_counts_what_the_trainer_moves():
    """Queries, keys, values and the output by an all-to-all each, copied before it and after it
    (`pangu.model.attention`); four key/value heads on eight ranks are sent twice."""
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=8"]
    layout += ["devices=16", "train.seq_length=4096", "backend.precision=bf16"]
    config = load(["model=pangu_pro_moe", *layout])
    counted = attention(shapes(config, from_config(config)))
    tokens, head = 4096 // 8, 128 * 2  # bytes of a head in 16 bits
    expected = {"queries": 20, "keys": 8, "values": 8, "output": 20}
    for phase in ("forward", "input_gradient"):
        sent = {
            message.name.removeprefix("attention "): float(message.bytes)
            for message in counted.messages
            if message.group == "cp" and message.phase == phase and message.count
        }
        assert sent == {name: heads * tokens * head for name, heads in expected.items()}
        (copies,) = (
            operator.bytes * operator.count
            for operator in counted.operators
            if operator.name == "attention.exchange copies" and operator.phase == phase
        )
        assert copies == 4 * sum(sent.values())
