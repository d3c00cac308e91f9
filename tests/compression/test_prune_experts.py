"""PreMoe against numpy, written from the equations over the router logits of transformers."""

import shutil

import gloo
import numpy as np
import pytest
import torch
from compression.ours import load_ours, logits
from compression.tiny import SETTINGS, TEXT, compress, saved
from inference.tiny_models import TINY
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from weights.test_round_trip import pangu_pro, pangu_pro_logits

from configs.compose import load, read_file
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.compression.experts import write
from pangu.data.tokenizer import load_tokenizer
from pangu.model.build import build_model
from pangu.weights.convert import export_model, import_model
from pangu.weights.expert_patterns import Pattern, listening, mean_pattern, mean_scores, run
from pangu.weights.prune_experts import (
    experts_left,
    kept_experts,
    pruned_config,
    pruned_tensors,
)
from simulator.parameters import count_parameters

WINDOW, TOKENS, EXPERTS = 32, 256, 8
SMALL = {**SETTINGS, "num_hidden_layers": 2, "intermediate_size": 32}
QWEN = Qwen3MoeConfig(
    **SMALL, head_dim=12, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=24,
    norm_topk_prob=False,
)  # fmt: skip
MIXTRAL = MixtralConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
DEEPSEEK = DeepseekV3Config(
    **{**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 4}, n_routed_experts=EXPERTS,
    num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    moe_intermediate_size=24, n_shared_experts=1, num_nextn_predict_layers=0,
)  # fmt: skip
KINDS = {"qwen": QWEN, "mixtral": MIXTRAL, "deepseek": DEEPSEEK}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A folder with a model, and the model of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, saved(KINDS[request.param], folder)


@pytest.fixture(scope="module")
def halves(pair):
    """The pattern's scores by layer, and a folder with the model of half of the experts."""
    folder, _ = pair
    store, out = folder / "store", folder / "half"
    assert prune(folder, out, "--keep", "0.5", "--store", store) == 0
    with safe_open(store / "text.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, out  # noqa: SIM118


def rows_of(folder):
    ids = load_tokenizer(folder / "ours" / "tokenizer").encode(TEXT)[:TOKENS]
    return torch.tensor(ids).view(-1, WINDOW)


def prune(folder, out, *words):
    words = ["prune-experts", folder / "ours", "--task", folder / "text", "--tokens", TOKENS,
             "--window", WINDOW, "--out", out, "--backend", "cpu", *words]  # fmt: skip
    return compress(words)


def their_router_logits(theirs, rows):
    """Of every MoE layer, `[T, E]` in float64."""
    found = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: found.append(
                args[0].flatten(0, -2).double() @ module.weight.double().t()
            )
        )
        for name, module in theirs.named_modules()
        if name.endswith((".mlp.gate", ".block_sparse_moe.gate"))
    ]
    with torch.no_grad():
        theirs(rows)
    for hook in hooks:
        hook.remove()
    return [layer.detach().numpy() for layer in found]


def bias_of(theirs, number):
    gate = theirs.model.layers[number].mlp.gate
    return getattr(gate, "e_score_correction_bias", torch.zeros(EXPERTS)).double().numpy()


def numpy_choice(config, s_TE, bias_E):
    """E_K(x): the numbers of each token's experts."""
    if not hasattr(config, "n_group"):
        return np.argsort(-s_TE, axis=1)[:, :2]
    ranked = 1 / (1 + np.exp(-s_TE)) + bias_E
    groups = np.sort(ranked.reshape(len(ranked), 2, 4), axis=-1)
    best = groups[:, :, -2:].sum(-1).argmax(1)  # the group whose two best are best
    allowed = np.arange(EXPERTS)[None] // 4 == best[:, None]
    return np.argsort(-np.where(allowed, ranked, -np.inf), axis=1)[:, :2]


def numpy_scores(score, s_TE, chosen_TK):
    """TCESS and PEU as in arXiv 2505.17639, token by token."""
    tokens, experts = s_TE.shape
    p = np.exp(np.take_along_axis(s_TE, chosen_TK, 1))
    p = p / p.sum(1, keepdims=True)
    r = p.max(1).mean()
    sums = np.zeros(experts)
    for t in range(tokens):
        for k, e in enumerate(chosen_TK[t]):
            s = s_TE[t, e]
            if score == "frequency":
                sums[e] += 1
            elif p[t, k] >= r:
                sums[e] += s if score == "tcess" else max(s, 1 / (1 + np.exp(-s)))
    return sums / tokens


def test_scores_are_the_papers(pair, halves):
    """PEU as the command stores it; the others of one pass."""
    folder, theirs = pair
    model, rows = load_ours(folder / "ours"), rows_of(folder)
    with listening(model) as choices:
        run(model, rows.flatten().tolist(), WINDOW)
    dense = getattr(theirs.config, "first_k_dense_replace", 0)
    s = their_router_logits(theirs, rows)
    assert list(choices) == list(halves[0])
    assert list(choices) == [f"decoder.layers.{dense + n}.mlp" for n in range(len(s))]
    for number, layer in enumerate(s):
        name = f"decoder.layers.{dense + number}.mlp"
        chosen = numpy_choice(theirs.config, layer, bias_of(theirs, dense + number))
        for score in ("peu", "tcess", "frequency"):
            stored = choices[name].scores(score, EXPERTS).numpy()
            found = halves[0][name] if score == "peu" else stored
            assert np.abs(found - numpy_scores(score, layer, chosen)).max() < 1e-5


def test_half_of_the_experts_is_the_model_of_transformers_with_half(pair, halves, tmp_path):
    """Rows cut out by hand, by numpy's choice; and what is exported is the same model."""
    folder, theirs = pair
    scores, out = halves
    groups = getattr(theirs.config, "n_group", 1)
    config = type(theirs.config)(**theirs.config.to_dict())
    count = "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts"
    setattr(config, "n_routed_experts" if groups > 1 else count, EXPERTS // 2)
    smaller = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cut = {}
    for key, value in theirs.state_dict().items():
        layer = scores.get("decoder." + key.partition("model.")[2].partition(".mlp.")[0] + ".mlp")
        if layer is not None and (".mlp.gate." in key or ".mlp.experts." in key):
            size = EXPERTS // groups
            best = [
                g * size + e
                for g in range(groups)
                for e in sorted(np.argsort(-layer[g * size : (g + 1) * size])[: size // 2])
            ]
            value = value[best]
        cut[key] = value
    smaller.load_state_dict(cut)
    rows = rows_of(folder)
    with torch.no_grad():
        expected = smaller(rows).logits
    assert (logits(load_ours(out), rows) - expected).abs().max() < 1e-4
    export_model(out, tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (read(rows).logits - expected).abs().max() < 1e-4


def test_a_quantised_model_keeps_its_codes(tmp_path):
    """Quantised, pruned, exported in packed form: the same logits in transformers."""
    folder = tmp_path / "float"
    folder.mkdir()
    saved(QWEN, folder)
    words = ["quantize", folder / "ours", "--scheme", "W4A16", "--calibration", folder / "text"]
    words += ["--tokens", TOKENS, "--window", WINDOW, "--group-size", 8, "--out", tmp_path / "ours"]
    assert compress([*words, "--backend", "cpu"]) == 0
    shutil.copy(folder / "text", tmp_path / "text")
    assert prune(tmp_path, tmp_path / "half") == 0
    export_model(tmp_path / "half", tmp_path / "out")
    rows = rows_of(folder)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (read(rows).logits - logits(load_ours(tmp_path / "half"), rows)).abs().max() < 1e-4


def test_keeping_all_is_the_identity(pair, tmp_path):
    folder, _ = pair
    assert prune(folder, tmp_path / "all", "--keep", "1") == 0
    one, other = Safetensors(folder / "ours"), Safetensors(tmp_path / "all")
    assert set(one.names()) == set(other.names())
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())
    assert read_file(folder / "ours" / "config.yaml", "") == read_file(
        tmp_path / "all" / "config.yaml", ""
    )


def test_groups_of_moge_stay_equal_and_what_belongs_to_an_expert_follows():
    """By numpy, over the tensors of a model with a bias and a learned scale for each expert."""
    gloo.single()
    config = load([*TINY, "moe.router_scale=true", "moe.expert_bias=true"])  # 8 in 4 groups
    model = build_model(config)[0][0]
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if torch.is_tensor(t)}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape))

    class Held:
        names, read = tensors.keys, tensors.__getitem__

    scores = {f"decoder.layers.{n}.mlp": torch.randn(8) for n in range(2)}
    scores["decoder.layers.0.mlp"][2:4] = 1.0  # equal: the first stays
    kept = kept_experts(config, scores, 0.5)
    for layer, scores_E in scores.items():
        pairs = scores_E.numpy().reshape(4, 2)
        assert kept[layer] == (np.arange(4) * 2 + pairs.argmax(1)).tolist()
    smaller = build_model(pruned_config(config, 0.5))[0][0]
    smaller.load_state_dict(dict(pruned_tensors(Held(), kept)))
    for name, tensor in smaller.state_dict().items():
        if ".mlp." in name and "shared" not in name:
            layer = name.partition(".mlp")[0] + ".mlp"
            assert np.array_equal(tensor.numpy(), tensors[name].numpy()[kept[layer]]), name
        elif torch.is_tensor(tensor):
            assert torch.equal(tensor, tensors[name]), name
    assert any("expert_bias" in name for name in tensors)
    assert any("router_scale" in name for name in tensors)


def test_pangu_pro_goes_out_with_half_of_each_group(tmp_path):
    """Against the released model's function in plain torch."""
    tensors = pangu_pro(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    scores = {f"decoder.layers.{n}.mlp": torch.randn(8) for n in range(2)}
    write(tmp_path / "ours", tmp_path / "half", scores, 0.5)
    export_model(tmp_path / "half", tmp_path / "out")
    rows = torch.arange(2 * 24).view(2, 24) * 7 % 64
    found = logits(load_ours(tmp_path / "half"), rows)
    for layer in range(2):
        p, pairs = f"model.layers.{layer}.mlp.", scores[f"decoder.layers.{layer}.mlp"].view(4, 2)
        best = (pairs.argmax(1) + 2 * torch.arange(4)).tolist()
        tensors[f"{p}gate.weight"] = tensors[f"{p}gate.weight"][best]
        tensors[f"{p}router_scale"] = tensors[f"{p}router_scale"][:, best]
        for part in ("gate_proj", "up_proj", "down_proj"):
            kept = [tensors.pop(f"{p}experts.{expert}.{part}.weight") for expert in range(8)]
            names = [f"{p}experts.{number}.{part}.weight" for number in range(4)]
            tensors |= {name: kept[expert] for name, expert in zip(names, best, strict=True)}
    assert (found - pangu_pro_logits(tensors, rows, members=1)).abs().max() < 1e-4
    out = Safetensors(tmp_path / "out")
    assert set(out.names()) == set(tensors)
    assert all(torch.equal(out.read(name), tensor) for name, tensor in tensors.items())


def test_a_generalist_is_the_mean_over_tasks_and_no_union():
    layer = "decoder.layers.0.mlp"
    code = Pattern({layer: torch.tensor([9.0, 6.0, 0.0, 0.0])}, "peu", 10, "")
    prose = Pattern({layer: torch.tensor([0.0, 6.0, 7.0, 0.0])}, "peu", 1000, "")
    mean = mean_pattern([code, prose])
    assert mean.scores[layer].tolist() == [4.5, 6.0, 3.5, 0.0]


def test_an_unchosen_expert_does_not_beat_a_chosen_one_with_a_negative_logit():
    logits, experts = torch.tensor([[-1.0, -9.0]] * 3), torch.tensor([[1, 2]] * 3)
    assert mean_scores("tcess", logits, experts, 3).argmax() != 1
    assert mean_scores("peu", logits, experts, 3).argmax() == 1


@pytest.mark.parametrize(
    ("routing", "keep", "message"),
    [
        (["moe.router=top_k", "moe.top_k=4"], 0.25, "leaves 2 of 8 experts, and a token chooses 4"),
        (["moe.top_k=8"], 0.5, "leaves 1 of 2 experts of each of 4 groups, and a token chooses 2"),
        (["model.num_experts=0", "model.ffn_hidden_size=32"], 0.5, "the model has no experts"),
        (["moe.router=expert_choice"], 0.5, "no task has experts of its own"),
    ],
)
def test_what_cannot_be_pruned(routing, keep, message):
    with pytest.raises(WeightsError, match=message):
        experts_left(load([*TINY, *routing]), keep)


def test_mistakes_are_one_sentence(pair, tmp_path, capsys):
    folder, _ = pair
    for words, message in (
        (["--keep", "0.1"], "keeping 0.1 leaves 1 of"),
        (["--task", "/nowhere"], "--task=/nowhere: cannot be read"),
        (["--task", folder / "text"], "is the name of two files"),
        (["--score", "random", "--store", tmp_path / "s"], "random scores tell no task"),
    ):
        assert prune(folder, tmp_path / "out", *words) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error
        assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_the_preset_is_what_is_written(pair, halves):
    """The simulator counts the smaller model's weights from the file beside it."""
    _, out = halves
    written = Safetensors(out)
    size = sum(written.read(name).numel() for name in written.names())
    buffers = [name for name in written.names() if name.endswith("expert_bias")]
    size -= sum(written.read(name).numel() for name in buffers)
    assert count_parameters(load([f"experiment={out / 'model.yaml'}"])).total == size
