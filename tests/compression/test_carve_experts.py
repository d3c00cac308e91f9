"""CMoE inside the experts of an MoE against plain torch, over the hidden states of transformers."""

import pytest
import torch
from compression.ours import load_ours, logits, turned_and_scaled
from compression.tiny import SETTINGS, TEXT, compress, saved
from torch.nn.functional import silu
from transformers import Qwen3MoeConfig

from configs.check import examine
from configs.compose import read_file
from pangu.data.tokenizer import load_tokenizer
from pangu.weights.carve import carving_of, parts_of
from pangu.weights.convert import export_model
from simulator.parameters import count_parameters

WINDOW, TOKENS, WIDTH = 32, 256, 48
QWEN = Qwen3MoeConfig(
    **{**SETTINGS, "num_hidden_layers": 2}, head_dim=12, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=WIDTH, norm_topk_prob=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def theirs(folder):
    return saved(QWEN, folder)


def carve(folder, name, source="ours"):
    out = folder / name
    if not out.exists():
        words = ["carve", folder / source, "--experts", name, "--calibration", folder / "text"]
        words += ["--tokens", TOKENS, "--window", WINDOW, "--out", out, "--backend", "cpu"]
        assert compress(words) == 0
    return out


def rows_of(folder):
    ids = load_tokenizer(folder / "ours" / "tokenizer").encode(TEXT)[:TOKENS]
    return torch.tensor(ids).view(-1, WINDOW)


def experts_of(mlp, x_TH):
    """Of each expert: its tokens, their weights, and h of those."""
    tensors = mlp.state_dict()
    p_TE = (x_TH @ tensors["gate.weight"].T).softmax(-1)
    best = p_TE.topk(2, dim=-1)
    weights = best.values / best.values.sum(-1, keepdim=True)
    for number, matrix in enumerate(tensors["experts.gate_up_proj"]):
        tokens, place = (best.indices == number).nonzero(as_tuple=True)
        gate, up = (x_TH[tokens] @ matrix.T).chunk(2, dim=-1)
        yield tokens, weights[tokens, place], silu(gate) * up


def whole(mlp, x, carvings=(), active=0):
    """The layer with all neurons computed and, of carved experts, those left out masked."""
    x_TH, down = x.flatten(0, -2), mlp.state_dict()["experts.down_proj"]
    out = torch.zeros_like(x_TH)
    for number, (tokens, weights, h) in enumerate(experts_of(mlp, x_TH)):
        if carvings:
            carving = carvings[number]
            on = torch.zeros_like(h, dtype=torch.bool)
            on[:, carving.shared] = True
            best = h[:, carving.speakers].abs().topk(active).indices
            on.scatter_(1, torch.from_numpy(carving.experts)[best].flatten(1), True)
            h = h * on
        out.index_add_(0, tokens, h @ down[number].T * weights[:, None])
    return out.view_as(x)


@pytest.mark.parametrize("name", ["S1A2E4", "S2A2E4", "S0A1E3"])
def test_experts_in_parts_compute_what_plain_torch_does(name, folder, theirs):
    out, parts, rows, inputs = carve(folder, name), parts_of(name), rows_of(folder), []
    mlps = [layer.mlp for layer in theirs.model.layers]
    plain = [mlp.forward for mlp in mlps]
    handles = [mlp.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())) for mlp in mlps]  # fmt: skip
    with torch.no_grad():
        before = theirs(rows, use_cache=False).logits
        for handle in handles:
            handle.remove()
        for mlp, x in zip(mlps, inputs, strict=True):
            marks = [
                h.abs().topk(10).indices.numpy() for _, _, h in experts_of(mlp, x.flatten(0, 1))
            ]
            cut = [carving_of(marks_TK, WIDTH, parts) for marks_TK in marks]
            mlp.forward = lambda x, mlp=mlp, cut=cut: whole(mlp, x, cut, parts.active)
        expected = theirs(rows, use_cache=False).logits
        for mlp, forward in zip(mlps, plain, strict=True):
            mlp.forward = forward
    ours = load_ours(out)
    found = logits(ours, rows)
    assert (found - expected).abs().max() <= 1e-4
    assert ((found - before).abs().max() <= 1e-5) == (parts.active == parts.routed)
    config = read_file(out / "config.yaml", "model")
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == count_parameters(config).total


def test_parts_are_turned_and_scaled_with_their_experts(folder, theirs, monkeypatch):
    carved = carve(folder, "S1A2E4")
    turned_and_scaled(carved, folder / "turned", rows_of(folder), 12, monkeypatch)


def test_what_parts_do_not_do_is_a_sentence(folder, theirs, tmp_path, capsys):
    from pangu.checkpoint.tensor_files import WeightsError

    carved = carve(folder, "S1A2E4")
    with pytest.raises(WeightsError, match="expert_parts=4"):
        export_model(carved, tmp_path / "out")
    common = ["--calibration", folder / "text", "--out", tmp_path / "out"]
    for words, message in (
        (["carve", carved, "--experts", "S1A1E2", *common], "experts are carved already"),
        (["carve", folder / "ours", "--experts", "S1A1E5", *common], "into 5 equal parts"),
        (["carve", folder / "ours", "--experts", "S0A2E4", "--groups", 2, *common], "one group"),
        (["prune-experts", carved, "--task", folder / "text", "--out", tmp_path / "out"],
         "prune the model that they come from"),
    ):  # fmt: skip
        assert compress(words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


PARTS = ["moe.expert_parts=4", "moe.shared_parts=1", "moe.active_parts=1", "model.num_experts=8",
         "moe.router=top_k", "moe.top_k=2", "moe.num_expert_groups=1"]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["moe.active_parts=4"], "moe.active_parts"),
        (["moe.top_k=3"], "moe.top_k"),
        (["model.num_experts=10"], "moe.expert_parts"),
        (["moe.router=forced_balance"], "moe.expert_parts"),
        (["parallel.expert_model_parallel_size=4", "devices=4"],
         "parallel.expert_model_parallel_size"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(overrides, key):
    _, found = examine([*PARTS, *overrides])
    assert key in {violation.key for violation in found}
