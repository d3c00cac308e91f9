"""LinearPatch against numpy, written from the equations over the hidden states of transformers."""

import numpy as np
import pytest
import torch
from compression.ours import load_ours, logits
from compression.tiny import TEXT, VOCABULARY, compress, llama
from gloo import single
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.check import load_checked
from configs.compose import load, read_file
from configs.violation import ConfigError
from pangu.checkpoint.tensor_files import Safetensors
from pangu.data.tokenizer import load_tokenizer
from pangu.inference.batching import Request
from pangu.inference.engine import Engine
from pangu.inference.sampling import Sampling
from pangu.weights.convert import export_model, import_model
from pangu.weights.hadamard import hadamard
from pangu.weights.prune_layers import measure, patch_matrix, pruned_config, pruned_tensors

LAYERS, WINDOW, TOKENS = 2, 32, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prune")


@pytest.fixture(scope="module")
def theirs(folder):
    return llama(folder)


def ids_of(folder) -> list[int]:
    return load_tokenizer(folder / "ours" / "tokenizer").encode(TEXT)[:TOKENS]


def numpy_patch(theirs, ids, start, kind):
    """Cosines of all windows, and P: equations of the paper, sections 3.1 to 3.3."""
    rows = torch.tensor(ids).view(-1, WINDOW)
    with torch.no_grad():
        states = theirs(rows, output_hidden_states=True).hidden_states
    x = [state.double().flatten(0, 1).numpy() for state in states]  # x[l]: the input of layer l
    cosines = []
    for first in range(6 - LAYERS):
        a, b = x[first], x[first + LAYERS]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(float(((a * b).sum(1) / norms).mean()))
    turn = hadamard(48) if kind == "hadamard" else np.eye(48)
    sizes = [np.abs(x[number] @ turn).sum(0) for number in (start, start + LAYERS)]
    return cosines, turn @ np.diag(sizes[1] / sizes[0]) @ turn.T


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 48, 60, 64, 576, 1536])
def test_hadamard_matrices(size):
    found = hadamard(size) * size**0.5
    assert np.abs(np.abs(found) - 1).max() < 1e-9
    assert np.abs(found.T @ found - size * np.eye(size)).max() < 1e-9 * size


def test_a_size_without_one_is_refused():
    with pytest.raises(ValueError, match="92"):
        hadamard(92)


@pytest.mark.parametrize("kind", ["none", "diagonal", "hadamard"])
def test_scores_patch_and_logits(kind, folder, theirs, capsys):
    ids, out = ids_of(folder), folder / kind
    words = ["prune-layers", str(folder / "ours"), "--layers", str(LAYERS), "--patch", kind]
    words += ["--calibration", str(folder / "text"), "--tokens", str(TOKENS), "--out", str(out)]
    assert compress([*words, "--window", str(WINDOW), "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    cosines, _ = numpy_patch(theirs, ids, 0, kind)
    start = int(np.argmax(cosines))
    _, patch = numpy_patch(theirs, ids, start, kind)
    for first, value in enumerate(cosines):
        assert f"{first} to {first + LAYERS - 1:3}  {value:.4f}" in printed

    config = read_file(out / "config.yaml", "model")
    assert config.model.num_layers == 4
    assert config.model.patched_layers == ([] if kind == "none" else [start])
    layers = theirs.model.layers
    kept = torch.nn.ModuleList([*layers[:start], *layers[start + LAYERS :]])
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    hook = None
    if kind != "none":
        written = Safetensors(out).read(f"decoder.layers.{start}.layer_patch.weight")
        assert np.abs(written.T.numpy() - patch).max() < 1e-4
        matrix = torch.from_numpy(patch).float()
        hook = kept[start].register_forward_pre_hook(lambda _, args: (args[0] @ matrix, *args[1:]))
    theirs.model.layers, theirs.config.num_hidden_layers = kept, 4
    try:
        rows = torch.tensor(ids).view(-1, WINDOW)
        with torch.no_grad():
            expected = theirs(rows, use_cache=False).logits
    finally:
        theirs.model.layers, theirs.config.num_hidden_layers = layers, 6
        for number, layer in enumerate(layers):
            layer.self_attn.layer_idx = number
        if hook:
            hook.remove()
    ours = load_ours(out)
    whole = logits(ours, rows)
    assert (whole - expected).abs().max() <= 1e-4
    likeliest = []  # without a cache
    for _ in range(5):
        likeliest.append(int(logits(ours, torch.tensor([ids[:7] + likeliest]))[0, -1].argmax()))
    engine = Engine(ours, vocab_size=VOCABULARY, cache_tokens=64, page_size=4)
    engine.add(Request(tuple(ids[:7]), 5, Sampling(temperature=0)))
    found = []
    while engine.busy:
        found += [token for update in engine.step() for token in update.tokens]
    assert found == likeliest


def test_no_layer_is_the_identity(folder, theirs):
    model = load_ours(folder / "ours")
    found = measure(model, ids_of(folder), layers=0, window=WINDOW, rotation=None)
    assert torch.equal(patch_matrix(found, 3, 0, None), torch.eye(48))
    source = Safetensors(folder / "ours")
    same = dict(pruned_tensors(source, 3, 0, None))
    assert set(same) == set(source.names())
    assert all(torch.equal(same[name], source.read(name)) for name in same)


def test_two_patches_at_one_place_become_one(folder, theirs):
    """Pruned twice: x·P₂, then the patch that stood there."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 48, 48, generator=generator)
    config = read_file(folder / "ours" / "config.yaml", "model")
    once = pruned_config(config, 2, 1, patched=True)
    assert (once.model.num_layers, once.model.patched_layers) == (5, [2])

    class Once:
        def __init__(self):
            self.tensors = dict(pruned_tensors(Safetensors(folder / "ours"), 2, 1, first))
            self.names = self.tensors.keys
            self.read = self.tensors.__getitem__

    twice = dict(pruned_tensors(Once(), 1, 1, second))
    config = pruned_config(once, 1, 1, patched=True)
    assert (config.model.num_layers, config.model.patched_layers) == (4, [1])
    patches = {name: tensor for name, tensor in twice.items() if "patch" in name}
    assert list(patches) == ["decoder.layers.1.layer_patch.weight"]
    assert (next(iter(patches.values())) - (second @ first).T).abs().max() < 1e-4


def test_dense_layers_of_a_moe_are_counted():
    config = load(["model.num_dense_layers=2", "model.num_layers=4", "model.ffn_hidden_size=32"])
    assert pruned_config(config, 1, 2, patched=False).model.num_dense_layers == 1


def test_layers_that_are_not_there_cannot_be_patched():
    with pytest.raises(ConfigError, match="from 0 to 3"):
        load_checked(["model.num_layers=4", "model.patched_layers=[4]"])


def poison(ours):
    name = next(file for file in ours.iterdir() if file.suffix == ".safetensors")
    held = load_file(name)
    held["decoder.final_layernorm.weight"][0] = float("nan")
    save_file(held, name)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ["--layers", "6"], "error: --layers 6: the model has 6, at most 5 can go"),
        (None, ["--start", "4"], "leave none of 6 behind them"),
        (None, ["--patch", "none", "--distill"], "no patch to teach"),
        ("shard", [], "no sound checkpoint"),
        ("truncated", [], "no sound checkpoint"),
        ("nan", [], "not finite"),
        ("config", [], "config.yaml"),
        (None, ["--calibration", "/nowhere"], "cannot be read"),
        (None, ["--out", "/proc/nowhere"], "cannot be made"),
    ],
)
def test_damage(change, options, message, folder, theirs, tmp_path, capsys):
    import shutil

    from pangu.checkpoint import manifest

    ours = tmp_path / "ours"
    shutil.copytree(folder / "ours", ours)
    file = next(path for path in ours.iterdir() if path.suffix == ".safetensors")
    if change == "shard":
        file.unlink()
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif change == "config":
        (ours / "config.yaml").write_text("model: {num_layers: many}\n")
    elif change == "nan":  # as a run writes it that went wrong: the manifest is right
        poison(ours)
        found = manifest.read(ours)
        found.files[file.name] = manifest.record(file)
        manifest.write(ours, found)
    words = ["prune-layers", str(ours), "--layers", "2", "--calibration", str(folder / "text")]
    words += ["--tokens", "64", "--window", "32", "--out", str(tmp_path / "out"), *options]
    assert compress(words) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_distillation_teaches_the_patch_alone(folder, theirs, tmp_path, capsys):
    words = ["prune-layers", folder / "ours", "--layers", 2, "--calibration", folder / "text"]
    words += ["--tokens", 256, "--window", 32, "--out", tmp_path / "plain"]
    assert compress(words) == 0
    before = perplexities(capsys.readouterr().out)
    words[-1] = tmp_path / "taught"
    words += ["--distill", "--distill-tokens", 1024, "--top", 16, "--learning-rate", "3e-3"]
    assert compress(words) == 0
    dense, pruned, taught = perplexities(capsys.readouterr().out)
    assert (dense, pruned) == tuple(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "taught"]
    one, other = Safetensors(tmp_path / "plain"), Safetensors(tmp_path / "taught")
    changed = [n for n in one.names() if not torch.equal(one.read(n), other.read(n))]
    assert [name.partition(".layer_patch")[1] for name in changed] == [".layer_patch"]
    # Random models agree about nothing but each other: the student is nearer to its teacher.
    rows = torch.tensor(ids_of(folder)).view(-1, WINDOW)
    single()
    expected = logits(load_ours(folder / "ours"), rows)
    gaps = []
    for name in ("plain", "taught"):
        found = logits(load_ours(tmp_path / name), rows)
        p, q = expected.log_softmax(-1), found.log_softmax(-1)
        gaps.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert gaps[1] < 0.9 * gaps[0]
    assert taught != pruned


def perplexities(printed: str) -> list[float]:
    rows = [line.split() for line in printed.splitlines()]
    return [float(row[-1]) for row in rows if row and row[0] in ("before", "patch", "distilled")]


def test_divergence_over_the_largest_logits():
    """Against numpy, in float64."""
    from pangu.weights.distill_patch import top_k_divergence

    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 5, 11, generator=generator)
    top = teacher.topk(4)
    found = top_k_divergence(student, top.indices, top.values)
    total = 0.0
    for t, s, chosen in zip(teacher, student, top.indices, strict=True):
        p, q = (np.exp(x[chosen].double().numpy()) for x in (t, s))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    assert float(found) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("scheme", ["", "W4A16"])
def test_a_patched_model_goes_out_with_its_class_and_comes_back(scheme, folder, theirs, tmp_path):
    """Perhaps quantised, pruned, exported: the same logits in transformers, which asks for leave to
    run the class; what is not quantised comes back to the last bit, and codes go out packed, those
    of the layers that stay."""
    common = ["--calibration", folder / "text", "--tokens", 256, "--window", 32, "--out"]
    model, small = folder / "ours", tmp_path / "small"
    if scheme:
        model = tmp_path / scheme
        words = ["quantize", folder / "ours", "--scheme", scheme, "--group-size", 16]
        assert compress([*words, *common, model]) == 0
    words = ["prune-layers", model, "--layers", 2, *common, small]
    words += ["--distill", "--distill-tokens", 64, "--top", 4] if scheme else []
    assert compress(words) == 0
    export_model(small, tmp_path / "out")
    if scheme:
        codes = [name for name in Safetensors(tmp_path / "out").names() if "packed" in name]
        assert len(codes) == 4 * 7
    rows = torch.tensor(ids_of(folder)).view(-1, WINDOW)
    expected = logits(load_ours(small), rows)
    with pytest.raises(ValueError, match=r"trust_remote_code|patched_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    options = {"dtype": torch.float32, "trust_remote_code": True}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    with torch.no_grad():
        assert (read(rows).logits - expected).abs().max() <= 1e-4
    if not scheme:
        import_model(tmp_path / "out", tmp_path / "back")
        one, other = Safetensors(small), Safetensors(tmp_path / "back")
        assert set(one.names()) == set(other.names())
        assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())
        assert read_file(tmp_path / "back" / "config.yaml", "model").model.patched_layers
