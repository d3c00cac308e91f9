"""A model of ours in a folder: weights in safetensors under our names, and what goes with them.

    config.yaml     the configuration tree; `model` and `moe` describe the weights
    model.yaml      those two groups alone: `experiment=DIR/model.yaml` anywhere
    tokenizer/      as beside a run's checkpoints
    huggingface/    config.json, generation settings, tokenizer and chat template as they came
    model-….safetensors, model.safetensors.index.json, manifest.json

It is read wherever a checkpoint is: `checkpoint.resume=DIR`, `pangu.generate checkpoint=DIR`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from configs.compose import to_yaml
from configs.schema import Config
from pangu.checkpoint import manifest
from pangu.checkpoint.run_state import RunState
from pangu.weights.writer import ModelFolder

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


def describe(folder: ModelFolder, config: Config) -> None:
    """Write the two configuration files."""
    (folder.partial / CONFIG).write_text(to_yaml(config))
    groups = {"model": asdict(config.model)}
    if config.model.num_experts:
        groups["moe"] = asdict(config.moe)
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
