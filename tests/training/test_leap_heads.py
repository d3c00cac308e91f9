"""L-MTP (arXiv 2505.17505) in training: against plain torch, over layouts, in its two stages."""

import gloo
import pytest
import torch
from layouts import all_layouts
from torch.nn.functional import cross_entropy, silu
from trained_model import EVERYTHING, build, micro_batch

from configs.check import examine
from configs.compose import load
from pangu.model.build import build_model
from pangu.model.leap_heads import leap_targets

LEAP = ["model.mtp_num_layers=0", "model.leap_heads=3", "model.leap_stride=2"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
ALONE = ["train.leap_heads_only=true"]


def test_targets_leap_over_no_document_and_no_end():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (3, 21), generator=generator)
    documents = (torch.rand(3, 21, generator=generator) < 0.2).cumsum(1)
    mask = (torch.rand(3, 20, generator=generator) < 0.8).float()
    found = leap_targets(tokens[:, 1:], mask, documents, 4, 3)
    for row in range(3):
        for at in range(20):
            for head in (1, 2, 3):
                target = at + 3 * head + 1
                inside = target <= 20 and documents[row, at] == documents[row, target]
                wanted = float(mask[row, target - 1]) if inside else 0.0
                assert found.mask[row, at, head - 1] == wanted
                if wanted:
                    assert found.labels[row, at, head - 1] == tokens[row, target]


def batch_with_documents(seed):
    batch = micro_batch(seed, 0.8, size=2)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(2, batch["tokens"].size(1) + 1, generator=generator) < 0.1
    return {**batch, "documents": ends.cumsum(1)}


def oracle(overrides, batches):
    """Gradients of mean main loss + 0.3 x mean over heads of each one's mean loss, and that mean;
    from the model's last hidden states on in plain torch."""
    net = build_model(load([*EVERYTHING, "launch.processes=1", *overrides]))[0][0].train()
    perturb(net)
    parameters = dict(net.named_parameters())
    main, tokens = 0.0, 0.0
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for batch in batches:
        hidden = []
        hook = net.decoder.register_forward_hook(lambda m, a, out, kept=hidden: kept.append(out))
        net(batch["tokens"], batch["position_ids"], None)
        hook.remove()
        states = hidden[0].transpose(0, 1)
        for row in range(2):
            for at in range(batch["tokens"].size(1)):
                state, mask = states[row, at], batch["loss_mask"][row]
                if mask[at]:
                    logits = parameters["output_layer.weight"] @ state
                    main = main + cross_entropy(logits, batch["labels"][row, at])
                    tokens += 1
                for head in (1, 2):
                    target = at + 2 * head
                    documents = batch["documents"][row]
                    if target >= len(mask) or documents[target + 1] != documents[at]:
                        continue
                    if not mask[target]:
                        continue
                    prefix = f"leap_heads.{head - 1}."
                    step = parameters[prefix + "leap_weight"] @ state
                    step = state + silu(step + parameters[prefix + "leap_bias"])
                    logits = parameters[prefix + "output_layer.weight"] @ step
                    loss = cross_entropy(logits, batch["labels"][row, target])
                    sums = sums + loss * torch.eye(2)[head - 1]
                    counts[head - 1] += 1
    total = main / tokens + 0.3 * (sums / counts).mean()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True)), (sums / counts).mean().item()


def perturb(net):
    """Heads that differ from the model's and from each other."""
    for name, parameter in net.named_parameters():
        if name.startswith("leap_heads."):
            generator = torch.Generator().manual_seed(len(name) + int(name[11]))
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_losses_and_gradients_are_those_of_plain_torch():
    gloo.single()
    settings = ["backend.precision=fp64", "model.mtp_loss_scaling_factor=0.3"]
    settings += ["optimizer.clip_grad=0", "moe.aux_loss_coefficient=0"]
    batches = [batch_with_documents(seed) for seed in range(2)]
    model = build([*LEAP, *settings])
    perturb(model.chunks[0].module)
    result = model.step(batches)
    expected, loss = oracle([*LEAP, *settings], batches)
    assert result.mtp_loss == pytest.approx(loss, rel=1e-6)
    for name, parameter in model.parameters().items():
        if expected[name] is not None:
            assert torch.allclose(parameter.main_grad, expected[name], rtol=1e-5, atol=1e-8), name


def test_the_first_stage_moves_the_heads_alone():
    gloo.single()
    model = build([*LEAP, *ALONE])
    bias = model.chunks[0].module.decoder.layers[1].mlp.router.expert_bias
    before = {name: value.clone() for name, value in model.parameters().items()}
    bias_before = bias.clone()
    for seed in range(3):
        model.step([batch_with_documents(seed)])
    assert torch.equal(bias, bias_before)
    for name, value in model.parameters().items():
        assert torch.equal(value, before[name]) != name.startswith("leap_heads."), name


@pytest.mark.distributed
def test_every_layout_trains_heads_as_one_process_does():
    leap = ["model.leap_heads=3", "model.mtp_loss_scaling_factor=0.5", "model.num_layers=2"]
    two = {"tp2": TP2, "pp2": PP2, "dp2": [], "cp2": ["parallel.context_parallel_size=2"]}
    alone = {f"{name} alone": [*two[name], *ALONE] for name in ("tp2", "pp2")}
    untied = {"pp2 alone untied": [*PP2, *ALONE, "model.tie_embeddings=false"]}
    both = {name: leap + rest for name, rest in {**two, **alone, **untied}.items()}
    single = {"": leap, "alone": leap + ALONE}
    single["untied"] = [*single["alone"], "model.tie_embeddings=false"]
    expected = gloo.alone(all_layouts, single, 1, 3)
    found = gloo.run(2, all_layouts, both, 2, 3)[0]
    assert len({round(values[2], 4) for values in expected[""]}) == 3
    for name, values in found.items():
        wanted = expected[name.split()[-1] if " " in name else ""]
        for mine, theirs in zip(values, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name


def test_heads_begin_as_the_models_own():
    """Until they are trained all heads say the same: stride 2, so only their labels differ."""
    gloo.single()
    for tied in ("true", "false"):
        overrides = [f"model.tie_embeddings={tied}", "model.init=tiny"]
        net = build_model(load([*EVERYTHING, "launch.processes=1", *LEAP, *overrides]))[0][0]
        hidden = torch.randn(3, 1, 32)
        expected = net.row_logits(hidden, torch.arange(3))
        assert torch.equal(net.leap_logits(1, hidden), expected)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.leap_heads=1"], "model.leap_heads"),
        (["model.leap_heads=4", "model.mtp_num_layers=1"], "model.leap_heads"),
        (["model.leap_heads=4", "model.leap_stride=64", "train.seq_length=64"], "leap_stride"),
        (["train.leap_heads_only=true"], "train.leap_heads_only"),
    ],
)
def test_what_cannot_work_is_named(overrides, key):
    _, found = examine(overrides)
    assert any(key in violation.key for violation in found)
