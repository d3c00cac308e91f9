"""What each loss of a step is a mean over, when only some positions are trained on: against sums in
plain torch."""

import gloo
import pytest
import torch
from torch.nn.functional import cross_entropy
from trained_model import EVERYTHING, build, micro_batch

from configs.compose import load
from pangu.model.build import build_model

SGD_LIKE = ["optimizer.clip_grad=0", "optimizer.weight_decay=0"]


def gradients(overrides, batches, world_size=1, rank=0):
    """Main gradients of one step; ranks take the micro-batches in turn, as Megatron deals them."""
    model = build([*SGD_LIKE, *overrides], world_size)
    result = model.step(batches[rank::world_size])
    found = {name: value.main_grad.clone() for name, value in model.parameters().items()}
    return found, result


ROUTER = "decoder.layers.1.mlp.router.weight"


def auxiliary_oracle(net, batches, coefficient):
    """Gradient at the router of mean main loss + coefficient x mean over the micro-batches of
    sum f_i p_i (arXiv 2505.21411, section 2.2), written out from the router's inputs."""
    layer = net.decoder.layers[1].mlp
    inputs: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda m, a, out: inputs.append(a[0]))
    main, tokens, balance = 0.0, 0.0, 0.0
    for batch in batches:
        logits = net(batch["tokens"], batch["position_ids"], None)
        mask = batch["loss_mask"].flatten()
        losses = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        main, tokens = main + (losses * mask).sum(), tokens + mask.sum()
        probabilities = (inputs.pop().flatten(0, 1) @ layer.router.weight.t()).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
        frequency = chosen.mean(0) * (8 / 2)  # of 8 experts, 2 are chosen
        balance = balance + (frequency * probabilities.mean(0)).sum()
    hook.remove()
    total = main / tokens + coefficient * balance / len(batches)
    return torch.autograd.grad(total, layer.router.weight)[0]


@pytest.mark.parametrize("trained", [1.0, 0.75, 0.5, 0.25])
def test_auxiliary_loss_does_not_depend_on_how_many_positions_are_trained(trained):
    gloo.single()
    batches = [micro_batch(seed, trained, size=2) for seed in range(3)]
    overrides = ["moe=top_k", "model.mtp_num_layers=0", "backend.precision=fp64"]
    found, _ = gradients([*overrides, "moe.aux_loss_coefficient=0.5"], batches)
    net = bare([*overrides, "moe.aux_loss_coefficient=0"])
    expected = auxiliary_oracle(net, batches, 0.5)
    assert (expected - auxiliary_oracle(net, batches, 0.0)).norm() > 1e-3
    assert torch.allclose(found[ROUTER], expected, rtol=1e-5, atol=1e-8)


def bare(overrides):
    """The same model without the engine's gradient buffers, into which experts write by
    themselves: its gradients are torch's."""
    return build_model(load([*EVERYTHING, "launch.processes=1", *overrides]))[0][0].train()


def mtp_oracle(net, batches, weight):
    """Gradients of mean main loss + weight x mean MTP loss, from the model's own logits."""
    net.config.mtp_loss_scaling_factor = 0.0  # what the model itself would add to the backward
    main, ahead, tokens, labelled = 0.0, 0.0, 0.0, 0.0
    heads: list[torch.Tensor] = []
    # Copies: the model's own cross-entropy writes gradients over the logits.
    hook = net.output_layer.register_forward_hook(lambda m, a, out: heads.append(out[0].clone()))
    for batch in batches:
        net(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        mtp_logits, logits = (head.transpose(0, 1) for head in heads)
        heads.clear()
        mask = batch["loss_mask"]
        losses = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        main = main + (losses * mask.flatten()).sum()
        tokens += mask.sum()
        # The label two further on, where there is one in the sequence and it is trained on.
        later = cross_entropy(
            mtp_logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        ahead = ahead + (later * mask[:, 1:].flatten()).sum()
        labelled += mask[:, 1:].sum()
    hook.remove()
    total = main / tokens + weight * ahead / labelled
    parameters = {n: p for n, p in net.named_parameters()}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True)), (ahead / labelled).item()


@pytest.mark.parametrize("trained", [1.0, 0.5])
@pytest.mark.parametrize("weight", [0.1, 0.7])
def test_mtp_loss_is_a_mean_over_its_own_labels(trained, weight):
    gloo.single()
    batches = [micro_batch(seed, trained, size=2) for seed in range(2)]
    overrides = ["backend.precision=fp64", f"model.mtp_loss_scaling_factor={weight}"]
    found, result = gradients(overrides, batches)
    expected, loss = mtp_oracle(bare(overrides), batches, weight)
    assert result.mtp_loss == pytest.approx(loss, rel=1e-6)
    for name, value in expected.items():
        if value is not None:
            assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-8), name
    assert found["mtp.layers.0.eh_proj.weight"].norm() > 1e-4


def on_rank(overrides, trained, world_size):
    import torch.distributed as dist

    batches = [micro_batch(seed, trained, size=2) for seed in range(4)]
    found, result = gradients(overrides, batches, world_size, dist.get_rank())
    return found[ROUTER], result.mtp_loss, result.loss


@pytest.mark.distributed
def test_masked_positions_split_over_replicas():
    """Two replicas with unequal masks give what one process gives."""
    overrides = ["backend.precision=fp64", "moe.aux_loss_coefficient=0.5"]
    overrides += ["parallel.zero_stage=0"]
    gloo.single()
    batches = [micro_batch(seed, 0.5, size=2) for seed in range(4)]
    single, result = gradients(overrides, batches)
    expected = single[ROUTER]
    for gradient, mtp, loss in gloo.run(2, on_rank, overrides, 0.5, 2):
        assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9)
        assert mtp == pytest.approx(result.mtp_loss, rel=1e-6)
        assert loss == pytest.approx(result.loss, rel=1e-9)
