"""LoRA in training: against plain torch, over layouts, saved, gone on with, merged."""

import checkpoint_runs
import gloo
import pytest
import torch
from compression.ours import logits
from compression.tiny import compress
from gloo import leave
from layouts import all_layouts
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from trained_model import EVERYTHING, build, micro_batch
from transformers import AutoModelForCausalLM

from configs.check import examine
from configs.compose import load
from pangu.model.build import build_model
from pangu.moe.adapters import ExpertAdapter
from pangu.ops.lora_linear import LoraColumn, LoraRow, _dropped
from pangu.trained_model import loaded
from pangu.weights.convert import export_model
from pangu.weights.lora import merged
from pangu.weights.model_folder import opened
from simulator.parameters import count_parameters, model_flops_per_token
from simulator.ranks import pipeline_ranks

LORA = ["model.lora_rank=4", "model.lora_alpha=8"]
MODULES = "linear_qkv,linear_proj,linear_fc1,linear_fc2,experts_fc1,experts_fc2"
EXPERTS = [*LORA, f"model.lora_modules=[{MODULES}]"]
WITHOUT = ["model.mtp_num_layers=0", "optimizer.clip_grad=0", "backend.precision=fp64"]


def whole(weights, adapters):
    """The weights with W + alpha/r B A in the place of each W."""
    found = dict(weights)
    for name in adapters:
        if not name.endswith(".lora_a"):
            continue
        linear = name.removesuffix(".lora_a")
        a, b = adapters[name], adapters[f"{linear}.lora_b"]
        if linear.endswith("_adapter"):  # expert by expert
            weight = linear.removesuffix("_adapter")
            each = zip(a, b, found[weight], strict=True)
            product = torch.stack([(x @ y.flatten(1)).view(w.shape) for x, y, w in each])
        else:
            weight, product = f"{linear}.weight", b @ a
        found[weight] = found[weight].detach() + 2.0 * product
    return found


def in_plain_torch(net, adapters, batch):
    """The loss of a micro-batch."""
    weights = whole(dict(net.named_parameters()), adapters)
    found = functional_call(net, weights, (batch["tokens"], batch["position_ids"], None))
    losses = cross_entropy(found.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()


class Held(dict):
    """Tensors by name as files of them are read."""

    names, read = dict.keys, dict.__getitem__

    def shape(self, name):
        return tuple(self[name].shape)


def test_adapters_train_as_in_plain_torch_and_nothing_else_moves():
    """Dense layer, routed experts and shared expert; torch's own AdamW."""
    gloo.single()
    model = build([*WITHOUT, *EXPERTS])
    before = {name: value.detach().clone() for name, value in model.parameters().items()}
    buffers = {name: value.clone() for name, value in model.chunks[0].module.named_buffers()}
    adapters = {name: value.clone() for name, value in before.items() if ".lora_" in name}
    assert len(adapters) == (4 + 6) * 2  # linears of both layers, matrices
    net = build_model(load([*EVERYTHING, "launch.processes=1", *WITHOUT]))[0][0].train()
    options = model.config.optimizer
    adam = torch.optim.AdamW(
        [value.requires_grad_() for value in adapters.values()],
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
    )
    for seed in range(3):
        batch = micro_batch(seed, 0.8, size=2)
        loss = in_plain_torch(net, adapters, batch)
        assert model.step([batch]).loss == pytest.approx(loss.item(), rel=1e-9)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, value in model.parameters().items():
        if name in adapters:
            assert torch.allclose(value, adapters[name], rtol=1e-6, atol=1e-9), name
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name
    for name, value in model.chunks[0].module.named_buffers():
        assert "expert_bias" not in name or torch.equal(value, buffers[name])
    plain, once = merged(model.config, Held(model.parameters()))
    assert plain.model.lora_rank == 0
    expected = whole(dict(net.named_parameters()), adapters)
    assert set(once.names()) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(once.read(name), value, rtol=1e-6, atol=1e-9), name


def test_the_simulator_has_the_bytes_of_adapters_alone():
    """Gradients and AdamW's moments as they are in the trainer, in bytes; of FLOPs a third less for
    what is frozen."""
    gloo.single()
    words = ["parallel.zero_stage=0", "model.mtp_num_layers=0", "backend.precision=fp32"]
    model = build([*EXPERTS, *words])
    model.step([micro_batch(0, 1.0, size=2)])
    buffers = model.chunks[0].buffers + model.chunks[0].expert_parallel_buffers
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    states = [each.optimizer.state for each in model.optimizer.chained_optimizers]
    moments = [m for state in states for held in state.values() for m in held.values()]
    (rank,) = pipeline_ranks(model.config)
    assert int(rank.memory.gradients) == gradients > 0
    assert int(rank.memory.optimizer) == sum(m.nbytes for m in moments if m.dim())
    plain = load([*EVERYTHING, *words])
    count = count_parameters(model.config)
    every, met = (
        sum(parts[name] for name in ("adapters", "expert_adapters"))
        for parts in (count.parts, count.active_parts)
    )
    trained = sum(p.numel() for p in model.parameters().values() if p.requires_grad)
    assert count.total - count_parameters(plain).total == every == trained
    products = model_flops_per_token(plain, seq_length=1) - 3 * 2 * 4 * (8 + 8)  # attention's own
    found = model_flops_per_token(model.config, seq_length=1) - 3 * 2 * 4 * (8 + 8)
    assert found == pytest.approx(products * 2 / 3 + 6 * met, rel=1e-9)


EXPERT_LAYOUTS = {
    "moge": ["parallel.expert_model_parallel_size=2", "moe.dispatcher=moge"],
    "tensor": ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"],
    "sliced, computed again": [
        "parallel.tensor_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=2",
        "memory=selective",
        "memory.recompute_modules=[moe_fc1,moe_permute]",
    ],
    "all computed again": ["parallel.pipeline_model_parallel_size=2", "memory=full"],
}
EXPERT_MODEL = ["model.num_layers=2", "moe=moge", "moe.top_k=2", "moe.num_expert_groups=2"]


DROPPED = ["model.lora_dropout=0.3"]
WHOLE = ["model.num_experts=0", "model.ffn_hidden_size=64", *LORA, *DROPPED]
WHOLE += ["model.num_layers=2", "model.lora_modules=[linear_qkv,linear_fc1]"]
BY_TENSOR = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=false"]


def dropped(world_size):
    """Which of 64 inputs are left by adapters whose input is whole, cut, or an expert's."""
    words = [*EXPERTS, *DROPPED, "model.mtp_num_layers=0"]
    sizes = ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"]
    modules = list(build([*words, *sizes], world_size).chunks[0].modules())
    column, row, expert = (next(m for m in modules if isinstance(m, kind))
                           for kind in (LoraColumn, LoraRow, ExpertAdapter))  # fmt: skip
    ones = torch.ones(64)
    found = [
        _dropped(column, ones, cut=False),
        _dropped(row, ones, cut=True),
        expert._dropped(ones),
    ]
    column.eval(), row.eval(), expert.eval()
    assert _dropped(column, ones, cut=False) is _dropped(row, ones, cut=True) is ones
    assert expert._dropped(ones) is ones
    return found


def on_two_ranks():
    layouts = {name: [*EXPERT_MODEL, *EXPERTS, *more] for name, more in EXPERT_LAYOUTS.items()}
    steps = all_layouts({**layouts, "dropped": [*WHOLE, *BY_TENSOR]}, 2, 3)
    return dropped(2), steps


@pytest.fixture(scope="module")
def two_ranks():
    """What each of two ranks drops, and the steps of every layout."""
    return gloo.run(2, on_two_ranks)


@pytest.mark.distributed
def test_adapters_of_experts_train_alike_in_every_layout(two_ranks):
    """Loss and gradient norm of three steps: A moves from the second on."""
    expected = gloo.alone(all_layouts, {"one": [*EXPERT_MODEL, *EXPERTS]}, 1, 3)["one"]
    for name in EXPERT_LAYOUTS:
        found = two_ranks[0][1][name]
        assert found == [pytest.approx(step, rel=1e-5) for step in expected], name


@pytest.mark.distributed
def test_ranks_that_hold_the_same_input_drop_the_same_of_it(two_ranks):
    """Others do not; evaluation drops nothing; two ranks train as one where inputs are whole."""
    whole, cut, expert = zip(*(found for found, _ in two_ranks), strict=True)
    assert torch.equal(*whole)
    assert not torch.equal(*cut)
    assert not torch.equal(*expert)
    assert whole[0].unique().tolist() == pytest.approx([0, 1 / 0.7])
    one = gloo.alone(all_layouts, {"one": WHOLE, "none": [*WHOLE, "model.lora_dropout=0"]}, 1, 3)
    two = two_ranks[0][1]["dropped"]
    assert two == [pytest.approx(step, rel=1e-5) for step in one["one"]]
    assert two[2] != pytest.approx(one["none"][2], rel=1e-3)


def test_what_is_computed_again_drops_the_same():
    words = [*EXPERT_MODEL, *EXPERTS, *DROPPED]
    again = {
        "kept": [],
        "layers": ["memory=full"],
        "modules": ["memory=selective", "memory.recompute_modules=[moe_fc1,moe_permute,mlp]"],
    }
    found = gloo.alone(all_layouts, {name: [*words, *more] for name, more in again.items()}, 1, 2)
    expected = found.pop("kept")
    for name, steps in found.items():
        assert steps == [pytest.approx(step, rel=1e-6) for step in expected], name


DENSE = ["model.num_layers=2", "model.num_experts=0", "model.ffn_hidden_size=64"]
SAVED = ["checkpoint.async_save=false", "checkpoint.keep_last=1"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
LAYOUTS = {
    "tp": TP2,
    "tp_whole_sequences": [*TP2, "parallel.sequence_parallel=false"],
    "pp": ["parallel.pipeline_model_parallel_size=2"],
}


def trained_on(folder, start, steps, layouts):
    """(loss, gradient norm) by step, of adapters from the run `start` on, by layout."""
    words = [*DENSE, *LORA, *SAVED, f"checkpoint.resume={folder / start}", f"train.steps={steps}"]
    return {
        name: checkpoint_runs.train(folder / name, [*words, *layout])[0]
        for name, layout in layouts.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run `base`, and `one`, which trains adapters of it for four steps; and what
    each of them gave."""
    folder = tmp_path_factory.mktemp("lora")
    gloo.alone(checkpoint_runs.train, folder / "base", [*DENSE, *SAVED, "train.steps=2"])
    return folder, gloo.alone(trained_on, folder, "base", 6, {"one": []})["one"]


@pytest.mark.distributed
def test_every_layout_trains_adapters_as_one_process_does(runs):
    """From a run without adapters on; and what two ranks have saved, one goes on with."""
    folder, one = runs
    assert list(one) == [3, 4, 5, 6]
    for name, steps in gloo.run(2, trained_on, folder, "base", 4, LAYOUTS)[0].items():
        for step, found in steps.items():
            assert found == pytest.approx(one[step], rel=1e-5), name
    steps = gloo.alone(trained_on, folder, "tp", 6, {"on": []})["on"]
    assert list(steps) == [5, 6]
    for step, found in steps.items():
        assert found == pytest.approx(one[step], rel=1e-5)
    plain, adapted = opened(folder / "base")[2], opened(folder / "tp")[2]
    assert set(plain.names()) < set(adapted.names())
    for name in adapted.names():
        if ".lora_" not in name:
            assert torch.equal(plain.read(name), adapted.read(name)), name


# Mixtral's shape.
MOE = ["model.num_layers=2", "model.shared_expert_ffn_hidden_size=0", *SAVED]
MOE += ["moe=top_k", "moe.num_expert_groups=1", "moe.router_scale=false", "moe.expert_bias=false"]
EP2 = ["parallel.expert_model_parallel_size=2"]


@pytest.mark.distributed
def test_adapters_of_experts_are_saved_resharded_and_merged(tmp_path):
    """Two ranks with four experts each, gone on with by one process, against one all along."""
    modules = ["model.lora_rank=4", "model.lora_modules=[experts_fc1,experts_fc2]"]
    gloo.alone(checkpoint_runs.train, tmp_path / "base", [*MOE, "train.steps=1"])

    def words(start, steps):
        return [*MOE, *modules, f"checkpoint.resume={tmp_path / start}", f"train.steps={steps}"]

    expected = gloo.alone(checkpoint_runs.train, tmp_path / "one", words("base", 4))[0]
    half = [*words("base", 3), *EP2]
    assert list(gloo.run(2, checkpoint_runs.train, tmp_path / "ep", half)[0][0]) == [2, 3]
    found = gloo.alone(checkpoint_runs.train, tmp_path / "on", words("ep", 4))[0]
    assert found == {4: pytest.approx(expected[4], rel=1e-5)}
    leave()
    rows = torch.arange(2 * 16).view(2, 16) * 7 % 256
    with loaded(tmp_path / "on", "cpu") as (model, _, _):
        ours = logits(model, rows)
    export_model(tmp_path / "on", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (read(rows).logits - ours).abs().max() <= 1e-5


def test_export_merges_adapters(runs, tmp_path, capsys):
    folder, _ = runs
    rows = torch.arange(2 * 16).view(2, 16) * 7 % 256
    found = {}
    for name in ("base", "one"):
        leave()
        with loaded(folder / name, "cpu") as (model, _, _):
            found[name] = logits(model, rows)
    export_model(folder / "one", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (read(rows).logits - found["one"]).abs().max() <= 1e-5
    assert (found["base"] - found["one"]).abs().max() > 1e-4
    (tmp_path / "text").write_text("1 2 3")
    words = ["carve", folder / "one", "--experts", "S1A2E4", "--out", tmp_path / "carved"]
    assert compress([*words, "--calibration", tmp_path / "text"]) == 2
    assert "has adapters: `pangu.convert export` merges" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_quantised_model_trains_on_and_says_what_becomes_of_its_codes(runs, tmp_path, capsys):
    """With adapters as QLoRA does, without as floats; neither goes out packed."""
    folder, _ = runs
    (tmp_path / "text").write_text("1 2 3")
    words = ["quantize", folder / "base", "--scheme", "W4A16", "--calibration", tmp_path / "text"]
    assert compress([*words, "--out", tmp_path / "small"]) == 0
    start = [*DENSE, *SAVED, f"checkpoint.resume={tmp_path / 'small'}", "train.steps=2"]
    rows, said = torch.arange(2 * 16).view(2, 16) * 7 % 256, {}
    for name, more in (("adapters", LORA), ("all", [])):
        capsys.readouterr()
        gloo.alone(checkpoint_runs.train, tmp_path / name, [*start, *more])
        said[name] = " ".join(capsys.readouterr().err.split())
        assert f"{tmp_path / 'small'} is quantised (W4A16): its weights" in said[name]
    assert "keep the values of their codes" in said["adapters"]
    assert "trained on as floats" in said["all"]
    small, adapted, trained = (opened(tmp_path / n)[2] for n in ("small", "adapters", "all"))
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(small.read(name), adapted.read(name))
    assert not torch.equal(small.read(name), trained.read(name))
    leave()
    with loaded(tmp_path / "adapters", "cpu") as (model, _, _):
        found = logits(model, rows)
    export_model(tmp_path / "adapters", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert getattr(read.config, "quantization_config", None) is None
    with torch.no_grad():
        assert (read(rows).logits - found).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.num_experts=8", "model.shared_expert_ffn_hidden_size=0"], "model.lora_modules"),
        (["model.lora_modules=[linear_q_proj]"], "model.lora_modules"),
        (["model.lora_modules=[]"], "model.lora_modules"),
        ([*DENSE, "model.lora_modules=[experts_fc1]"], "model.lora_modules"),
        (["model.leap_heads=4", "train.leap_heads_only=true"], "model.lora_rank"),
    ],
)
def test_what_cannot_work_is_named(overrides, key):
    _, found = examine([*LORA, *overrides])
    assert [violation.key for violation in found] == [key]
