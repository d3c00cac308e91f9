"""A model of ours in a folder: weights in safetensors under our names, and what goes with them.

    config.yaml     the configuration tree; `model` and `moe` describe the weights
    model.yaml      those two groups alone, and a quantised model's precisions:
                    `experiment=DIR/model.yaml` anywhere
    tokenizer/      as beside a run's checkpoints
    huggingface/    config.json, generation settings, tokenizer and chat template as they came
    model-….safetensors, model.safetensors.index.json, manifest.json

It is read wherever a checkpoint is: `checkpoint.resume=DIR`, `pangu.generate checkpoint=DIR`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from configs.compose import read_file, to_yaml
from configs.planning import InferenceConfig
from configs.schema import Config
from configs.violation import ConfigError
from pangu.checkpoint import manifest, model_files
from pangu.checkpoint.restore import CHECKPOINTS
from pangu.checkpoint.run_state import RunState
from pangu.checkpoint.run_tensors import RunTensors
from pangu.checkpoint.tensor_files import Safetensors, Source, WeightsError
from pangu.weights.writer import ModelFolder, finite

HUGGING_FACE = "huggingface"
TOKENIZER = "tokenizer"
CONFIG = "config.yaml"
PRESET = "model.yaml"
# What goes beside the weights of a Hugging Face model; never code (`.py`), never pickles (`.bin`).
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def opened(path: Path) -> tuple[Path, Config, Source]:
    """The folder, the configuration and the tensors of a model of ours: an imported one, a
    checkpoint, or a run's newest sound checkpoint.

    Raises:
        WeightsError: it is none of these, or damaged.
    """
    path = _whole_checkpoint(path)
    try:
        config = read_file(path / CONFIG, "model")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    return path, config, Safetensors(path) if model_files.holds_model(path) else RunTensors(path)


def _whole_checkpoint(path: Path) -> Path:
    """The folder itself, or the newest sound checkpoint of a run."""
    if (path / manifest.MANIFEST).is_file():
        folders = [path]
    elif (folders := manifest.complete(path / CHECKPOINTS)) == []:
        raise WeightsError(f"{path} is no folder of a model and no run with a checkpoint")
    wrong = []
    for folder in folders:
        try:
            if not (damage := manifest.damage(folder, manifest.read(folder))):
                return folder
            wrong += damage
        except manifest.DamagedCheckpoint as error:
            wrong.append(str(error))
    raise WeightsError(f"{path} has no sound checkpoint: {'; '.join(wrong)}")


def write(
    out: Path,
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor]],
    made_of: Path,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """A new folder at `out` with the model that `config` describes, and with the tokenizer and the
    settings that the model in `made_of` came with; `beside` writes what else belongs there.

    Raises:
        WeightsError: a tensor is not finite, or `out` cannot be written; nothing is left there.
    """
    with ModelFolder(out) as folder:
        for name, tensor in tensors:
            folder.add(name, finite(name, tensor))
        folder.finish()
        if (made_of / HUGGING_FACE).is_dir():
            copy_companions(made_of / HUGGING_FACE, folder.partial / HUGGING_FACE)
        if (made_of / TOKENIZER).is_dir():
            shutil.copytree(made_of / TOKENIZER, folder.partial / TOKENIZER)
        describe(folder, config)
        if beside:
            beside(folder.partial)
        seal(folder)


def describe(folder: ModelFolder, config: Config) -> None:
    """Write the two configuration files."""
    (folder.partial / CONFIG).write_text(to_yaml(config))
    groups = {"model": asdict(config.model)}
    if config.model.num_experts:
        groups["moe"] = asdict(config.moe)
    served = asdict(config.inference)
    if other := {k: v for k, v in served.items() if v != getattr(InferenceConfig(), k)}:
        groups["inference"] = other  # what a quantised model is priced by
    text = OmegaConf.to_yaml(OmegaConf.create(groups))
    (folder.partial / PRESET).write_text("# @package _global_\n" + text)


def seal(folder: ModelFolder) -> None:
    """The manifest of all files, which makes the folder a checkpoint of step 0."""
    files = {
        str(path.relative_to(folder.partial)): manifest.record(path)
        for path in sorted(folder.partial.rglob("*"))
        if path.is_file()
    }
    state = asdict(RunState())
    manifest.write(folder.partial, manifest.Manifest(0, state, 0, 1, files))


def copy_companions(source: Path, target: Path) -> None:
    """Copy what there is of `COMPANIONS`, larger than configuration or not."""
    target.mkdir(exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
