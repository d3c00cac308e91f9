"""Experts read in for a task: the same model as the one that pruning writes, and no byte more."""

import json
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compression.ours import load_ours, logits
from compression.test_prune_experts import KINDS, rows_of
from compression.tiny import TEXT, byte_tokenizer, compress, saved
from gloo import leave, single
from inference.tiny_models import TINY, build
from safetensors.torch import load_file
from serving.tiny_server import client, serving

from configs.compose import load
from configs.violation import ConfigError
from pangu.checkpoint.tensor_files import Safetensors
from pangu.data.tokenizer import load_tokenizer
from pangu.generate import Options, stream
from pangu.serve import Options as Served
from pangu.serve import _engine, _server
from pangu.task_experts import TaskChoice, opened
from pangu.weights.model_folder import write

OTHER = "0123456789 " * 400


def read_so_far() -> int:
    """Bytes that this process has asked the kernel for, whoever counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """By kind, once: a folder with a model, patterns of two texts in `store`, and what pruning by
    each writes."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            prepare(made[kind], kind)
        return made[kind]

    return folder_of


@pytest.fixture(scope="module", params=KINDS)
def folder(request, prepared):
    return prepared(request.param)


def prepare(folder, kind):
    saved(KINDS[kind], folder)
    (folder / "digits").write_text(OTHER)
    both = ["--task", folder / "text", "--task", folder / "digits"]
    for name, tasks in (("text", both[:2]), ("digits", both[2:]), ("generalist", both)):
        words = ["prune-experts", folder / "ours", *tasks, "--tokens", 256, "--window", 32]
        words += ["--out", folder / f"half-{name}", "--store", folder / "store"]
        assert compress([*words, "--backend", "cpu"]) == 0


@pytest.fixture
def held(folder):
    leave()
    choice = TaskChoice(folder / "store")
    with opened(folder / "ours", "cpu", choice) as (trained, experts):
        yield trained, experts


def test_switching_gives_what_pruning_writes(folder, held):
    (model, _, _), experts = held
    rows = rows_of(folder)
    found = {}
    for name in ("text", "digits", "text", "generalist"):
        experts.hold(name)
        found[name] = logits(model, rows)
    leave()
    for name, logits_found in found.items():
        assert torch.equal(logits_found, logits(load_ours(folder / f"half-{name}"), rows))
    assert not torch.equal(found["text"], found["digits"])


def test_only_the_bytes_of_kept_experts_are_read(folder, held):
    _, experts = held
    source = Safetensors(folder / "ours")
    size = sum(source.read(n).nbytes for n in source.names() if ".mlp.experts." in n)
    before, counted = read_so_far(), experts.bytes_read
    experts.hold("text")
    assert experts.bytes_read - counted == size // 2
    assert size // 2 <= read_so_far() - before < size // 2 + 1000
    counted = experts.bytes_read
    experts.hold("text")
    assert experts.bytes_read == counted
    experts.hold("digits")  # what both tasks want is there
    assert 0 < experts.bytes_read - counted < size // 2


def test_a_prompt_finds_its_task(folder, held):
    (_, tokenizer, _), experts = held
    assert experts.task_of(tokenizer.encode(TEXT[300:400])) == "text"
    assert experts.task_of(tokenizer.encode(OTHER[3:70])) == "digits"


PROMPTS = [
    "0123456789 01",
    "def llama(folder: ",
    "456789 0123",
    "theirs = model(config",
    "789 01234567",
]


@pytest.fixture(scope="module")
def qwen(prepared):
    folder = prepared("qwen")
    (folder / "prompts").write_text("\n".join(PROMPTS))
    return folder


def generated(folder, **options):
    """What `pangu.generate` adds to each prompt."""
    leave()
    common = {"prompts": str(folder / "prompts"), "max_new_tokens": 12, "temperature": 0}
    lines = "".join(stream(Options(backend="cpu", **common, **options)))
    return [json.loads(line)["text"] for line in lines.splitlines()]


@pytest.fixture(scope="module")
def alone(qwen):
    """By task: what the model that pruning wrote adds to each prompt."""
    return {
        task: generated(qwen, checkpoint=str(qwen / f"half-{task}"))
        for task in ("digits", "text", "generalist")
    }


def test_generation_switches_with_its_prompts(qwen, alone, capsys):
    """Prompts of two tasks, in turn: each as the model of its own task has it."""
    common = {"checkpoint": str(qwen / "ours"), "patterns": str(qwen / "store")}
    tasks = ["digits", "text", "digits", "text", "digits"]
    expected = [alone[task][number] for number, task in enumerate(tasks)]
    assert expected != alone["text"]
    assert generated(qwen, **common) == expected
    told = [line for line in capsys.readouterr().err.splitlines() if "read so far" in line]
    assert [line.split()[2].strip(":") for line in told] == ["digits", "text"]
    assert generated(qwen, **common, task="generalist") == alone["generalist"]


def test_a_server_switches_between_requests(qwen, alone):
    """Many clients at a time; what follows is that of the model of each prompt's task."""
    leave()
    choice = TaskChoice(qwen / "store")
    with opened(qwen / "ours", "cpu", choice) as (trained, experts):
        asked = Served(checkpoint=str(qwen / "ours"), name="tiny")
        engine = _engine(asked, trained, several=False)
        server = _server(asked, "", trained, engine, experts)
        with serving(server) as address, ThreadPoolExecutor(8) as pool:
            api = client(address)

            def ask(prompt):
                options = {"model": "tiny", "max_tokens": 12, "temperature": 0}
                return api.completions.create(prompt=prompt, **options).choices[0].text

            found = list(pool.map(ask, PROMPTS * 4))
            figures = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert not server.worker.engine.busy
    assert f"pangu_checkpoint_bytes_read_total {float(experts.bytes_read)}" in figures
    tasks = ["digits", "text", "digits", "text", "digits"]
    assert found == [alone[task][number] for number, task in enumerate(tasks)] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "law"}, "task=law: is not stored (one of auto, generalist, digits, text)"),
        ({"keep": 0.1}, "keeping 0.1 leaves 1 of 8 experts, and a token chooses 2"),
        ({"patterns": "/nowhere"}, "/nowhere holds no patterns"),
        ({"checkpoint": "half-text"}, "is the pattern of another model"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(options, message, qwen):
    given = {"checkpoint": "ours", "patterns": str(qwen / "store")} | options
    given["checkpoint"] = str(qwen / given["checkpoint"])
    with pytest.raises(ConfigError) as error:
        generated(qwen, **given)
    assert message in " ".join(str(error.value).split())


def test_a_file_cut_short_is_refused(qwen, tmp_path):
    shutil.copytree(qwen / "ours", tmp_path / "ours")
    file = next((tmp_path / "ours").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="bytes"):
        generated(qwen, checkpoint=str(tmp_path / "ours"), patterns=str(qwen / "store"))


@pytest.mark.parametrize(
    "options",
    [
        ["model.mtp_num_layers=1", "moe.expert_bias=true"],
        ["moe.score_function=gated", "moe.router_scale=true", "moe.expert_bias=true"],
    ],
)
def test_other_layers_and_routers(options, tmp_path):
    """Layers of multi-token prediction are pruned by their own routers, and the model is judged
    without them: logits need no labels. Routers of carved experts have two matrices and a scale. A
    text's own tokens have the scores of its pattern."""
    options = ["model.vocab_size=272", *options]
    model = build(*options)
    (tmp_path / "from").mkdir()
    byte_tokenizer(tmp_path / "from")
    load_tokenizer(tmp_path / "from" / "tokenizer.json").save(tmp_path / "from" / "tokenizer")
    tensors = ((n, t) for n, t in model.state_dict().items() if torch.is_tensor(t))
    write(tmp_path / "ours", load([*TINY, *options]), tensors, made_of=tmp_path / "from")
    (tmp_path / "text").write_text(TEXT)
    words = ["prune-experts", tmp_path / "ours", "--task", tmp_path / "text", "--tokens", 64]
    words += ["--out", tmp_path / "half", "--store", tmp_path / "store", "--backend", "cpu"]
    assert compress(words) == 0
    with opened(tmp_path / "ours", "cpu", TaskChoice(tmp_path / "store")) as (trained, experts):
        scores = experts._query(trained.tokenizer.encode(TEXT)[:64])
        experts.hold("text")
        found = trained.model.state_dict()
    stored = load_file(tmp_path / "store" / "text.safetensors")
    assert (scores - stored["decoder.layers.0.mlp"]).abs().max() < 1e-6
    single()
    expected = load_ours(tmp_path / "half").state_dict()
    held = {name.partition(".mlp.experts.")[0] for name in expected if ".mlp.experts." in name}
    assert len(held) == len(stored) == 2 + ("model.mtp_num_layers=1" in options)
    for name, tensor in expected.items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor, found[name]), name
