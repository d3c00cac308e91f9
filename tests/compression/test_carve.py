"""CMoE against numpy, written from the paper over the hidden states of transformers."""

import numpy as np
import pytest
import torch
from compression.ours import load_ours, logits, turned_and_scaled
from compression.tiny import TEXT, VOCABULARY, compress, llama
from transformers import AutoModelForCausalLM

from configs.check import load_checked
from configs.compose import read_file
from configs.violation import ConfigError
from pangu.checkpoint.tensor_files import Safetensors
from pangu.data.tokenizer import load_tokenizer
from pangu.inference.batching import Request
from pangu.inference.engine import Engine
from pangu.inference.sampling import Sampling
from pangu.weights.balanced import balanced_assignment
from pangu.weights.carve import carving_of, grouped, mark_costs, parts_of
from pangu.weights.convert import export_model, import_model
from pangu.weights.model_folder import opened, write
from simulator.parameters import count_parameters

WINDOW, TOKENS, WIDTH = 32, 256, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("carve")


@pytest.fixture(scope="module")
def theirs(folder):
    return llama(folder)


def carve(folder, name, *words):
    """`folder / name` is the model carved in such a way."""
    command = ["carve", folder / "ours", *words, "--calibration", folder / "text"]
    command += ["--tokens", TOKENS, "--window", WINDOW, "--out", folder / name, "--backend", "cpu"]
    return compress(command)


def carve_once(folder, name, groups=1):
    """The folder of the model carved so, which other tests may have made."""
    out = folder / f"{name}-{groups}"
    if not out.exists():
        assert carve(folder, out.name, "--experts", name, "--groups", groups) == 0
    return out


def rows_of(folder):
    ids = load_tokenizer(folder / "ours" / "tokenizer").encode(TEXT)[:TOKENS]
    return torch.tensor(ids).view(-1, WINDOW)


def least_cost(costs):
    """The cost of the cheapest balanced assignment, by the numbers of rows placed so far."""
    rows, clusters = costs.shape
    best = {(0,) * clusters: 0}
    for row in costs.tolist():
        after = {}
        for placed, cost in best.items():
            for cluster, more in enumerate(row):
                if placed[cluster] < rows // clusters:
                    now = (*placed[:cluster], placed[cluster] + 1, *placed[cluster + 1 :])
                    after[now] = min(after.get(now, cost + more), cost + more)
        best = after
    return best[(rows // clusters,) * clusters]


def test_balanced_assignments_are_the_cheapest():
    numbers = np.random.default_rng(0)
    for _ in range(40):
        clusters, size = numbers.integers(2, 5), numbers.integers(1, 5)
        costs = numbers.integers(-9, 9, (clusters * size, clusters))
        costs[:, 0] -= numbers.integers(0, 12)  # all want the first
        found = balanced_assignment(costs)
        assert (np.bincount(found) == size).all()
        assert costs[np.arange(len(costs)), found].sum() == least_cost(costs)


def greedy(distance, size):
    """Neurons one after the other, to the nearest cluster with room."""
    left, total = [size] * distance.shape[1], 0.0
    for row in distance:
        nearest = min((cluster for cluster, room in enumerate(left) if room), key=row.__getitem__)
        left[nearest] -= 1
        total += row[nearest]
    return total


def test_clusters_of_marks_are_nearest_by_distance():
    """Sums of L1 distances of whole columns of marks, which the released code adds up."""
    numbers = np.random.default_rng(1)
    marks = np.stack([numbers.choice(24, 3, replace=False) for _ in range(60)])
    columns = np.zeros((60, 24))
    np.put_along_axis(columns, marks, 1, axis=1)
    means = np.stack([columns[:, :6].mean(1), columns[:, 6:12].mean(1)], axis=1)
    distance = np.abs(columns[:, 12:, None] - means[:, None]).sum(0)
    place = np.concatenate([np.full(12, -1), np.arange(12)])
    costs = mark_costs(marks, place, np.rint(6 * means).astype(int), 6)
    differences = 6 * distance - costs
    assert np.allclose(differences, differences[0])  # the same for all neurons
    chosen = balanced_assignment(costs)
    total = distance[np.arange(12), chosen].sum()
    assert total == pytest.approx(least_cost(distance))
    assert total <= greedy(distance, 6)


def carved_mlp(mlp, carving, parts, x):
    """The paper's equations 4 to 9, with all neurons computed and those left out masked."""
    h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    scores = h[..., carving.speakers].abs().softmax(-1)
    on = torch.zeros_like(h, dtype=torch.bool)
    on[..., carving.shared] = True
    group = parts.routed // parts.groups
    for first in range(0, parts.routed, group):
        best = scores[..., first : first + group].topk(parts.active // parts.groups).indices + first
        members = torch.from_numpy(carving.experts)[best].flatten(-2)
        on.scatter_(-1, members, True)
    return mlp.down_proj(h * on)


WAYS = [("S2A4E6", 1), ("S3A3E8", 1), ("S0A2E4", 2), ("S2A2E6", 2)]


@pytest.mark.parametrize(("name", "groups"), WAYS)
def test_a_carved_model_computes_what_the_paper_says(name, groups, folder, theirs):
    out = carve_once(folder, name, groups)
    parts, rows, inputs = parts_of(name, groups), rows_of(folder), []
    mlps = [layer.mlp for layer in theirs.model.layers]
    handles = [mlp.down_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())) for mlp in mlps]  # fmt: skip
    with torch.no_grad():
        dense = theirs(rows, use_cache=False).logits
    for handle in handles:
        handle.remove()
    plain = [mlp.forward for mlp in mlps]
    for mlp, h in zip(mlps, inputs, strict=True):
        marks = h.abs().flatten(0, 1).topk(10).indices.numpy()
        carving = carving_of(marks, WIDTH, parts)
        columns = np.zeros((len(marks), WIDTH))
        np.put_along_axis(columns, marks, 1, axis=1)
        least = columns.mean(0)[carving.shared].min() if parts.shared else 1.0
        assert least >= columns.mean(0)[carving.experts].max()
        whole = np.concatenate([carving.shared, carving.experts.ravel()])
        assert sorted(whole) == list(range(WIDTH))  # every neuron once
        for members, speaker in zip(carving.experts, carving.speakers, strict=True):
            mean = columns[:, members].mean(1)
            far = np.abs(columns[:, members] - mean[:, None]).sum(0)
            assert far[members == speaker] == pytest.approx(far.min())
        mlp.forward = lambda x, *made, mlp=mlp, carving=carving: carved_mlp(mlp, carving, parts, x)
    try:
        with torch.no_grad():
            expected = theirs(rows, use_cache=False).logits
    finally:
        for mlp, forward in zip(mlps, plain, strict=True):
            mlp.forward = forward
    ours = load_ours(out)
    found = logits(ours, rows)
    assert (found - expected).abs().max() <= 1e-4
    everything = parts.active == parts.routed
    assert ((found - dense).abs().max() <= 1e-5) == everything
    config = read_file(out / "config.yaml", "model")
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == count_parameters(config).total


def test_generation_is_the_same_with_a_cache(folder, theirs):
    ours, ids = load_ours(carve_once(folder, "S1A2E4")), rows_of(folder)[0, :7].tolist()
    likeliest = []
    for _ in range(5):
        likeliest.append(int(logits(ours, torch.tensor([ids + likeliest]))[0, -1].argmax()))
    engine = Engine(ours, vocab_size=VOCABULARY, cache_tokens=64, page_size=4)
    engine.add(Request(tuple(ids), 5, Sampling(temperature=0)))
    found = []
    while engine.busy:
        found += [token for update in engine.step() for token in update.tokens]
    assert found == likeliest


def test_experts_of_the_same_tokens_lie_in_different_groups():
    alike = np.array([[3, 3, 0, 0], [0, 0, 2, 2], [4, 4, 0, 0]])  # 0 with 1, 2 with 3
    order = grouped(alike, 2)
    assert {frozenset(order[:2]), frozenset(order[2:])} != {frozenset([0, 1]), frozenset([2, 3])}


GATED = ["moe.score_function=gated", "moe.router=top_k", "moe.aux_loss_coefficient=0",
         "moe.renormalize=false",
         "moe.router_scale=true", "moe.expert_bias=true", "model.num_layers=2"]  # fmt: skip


@pytest.mark.parametrize("key", ["moe.aux_loss_coefficient", "moe.z_loss_coefficient"])
def test_gated_scores_have_no_losses(key):
    with pytest.raises(ConfigError, match=key):
        load_checked([*GATED, f"{key}=0.1"])


def test_both_matrices_of_the_router_are_turned_and_scaled(folder, theirs, monkeypatch):
    carved = carve_once(folder, "S1A2E4")
    model = turned_and_scaled(carved, folder / "turned", rows_of(folder), 32, monkeypatch)
    assert not torch.equal(
        model.decoder.layers[0].mlp.router.up_weight,
        Safetensors(carved).read("decoder.layers.0.mlp.router.up_weight"),
    )


@pytest.mark.parametrize(("name", "groups"), [("S1A2E4", 1), ("S0A2E4", 2)])
def test_it_goes_out_with_its_class_and_comes_back(name, groups, folder, theirs, tmp_path):
    """With a scale and a bias, as training leaves them."""
    carved = carve_once(folder, name, groups)
    numbers = torch.Generator().manual_seed(1)

    def trained(key, tensor):
        learned = key.endswith(("router_scale", "expert_bias"))
        return tensor + 0.3 * torch.randn(tensor.shape, generator=numbers) * learned

    path, config, source = opened(carved)
    tensors = ((key, trained(key, source.read(key))) for key in source.names())
    write(tmp_path / "ours", config, tensors, made_of=path)
    export_model(tmp_path / "ours", tmp_path / "out")
    options = {"dtype": torch.float32, "trust_remote_code": True}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    rows = rows_of(folder)
    with torch.no_grad():
        found = read(rows, use_cache=False).logits
    assert (found - logits(load_ours(tmp_path / "ours"), rows)).abs().max() <= 1e-4
    import_model(tmp_path / "out", tmp_path / "back")
    one, other = Safetensors(tmp_path / "ours"), Safetensors(tmp_path / "back")
    assert set(one.names()) == set(other.names())
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.names())


MISTAKES = {
    "S3A3": "is not like S3A3E8",
    "S3A6E8": "5 routed experts, and a token chooses 6",
    "S1A3E7": "96 neurons do not fall into 7",
    "S2A3E8 --groups 2": "--groups 2 does not divide both 6 routed experts and 3 active: 1, 3",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_a_sentence(words, folder, theirs, capsys):
    name, *more = words.split()
    assert carve(folder, "never", "--experts", name, *more) == 2
    assert MISTAKES[words] in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "never").exists()


def test_experts_are_not_carved_again(folder, theirs, capsys):
    words = [
        "carve",
        carve_once(folder, "S1A2E4"),
        "--experts",
        "S1A1E2",
        "--calibration",
        folder / "text",
    ]
    assert compress([*words, "--out", folder / "twice"]) == 2
    assert "experts are carved already" in capsys.readouterr().err
