"""Models of ours in a folder, in this process. Not in `tiny.py`, whose own text the tests read."""

from pathlib import Path

import torch
from gloo import single
from megatron.core.models.gpt import GPTModel

from configs.compose import read_file
from pangu.checkpoint import restore
from pangu.model.build import build_model


def load_ours(path: Path) -> GPTModel:
    single()
    chunks, _ = build_model(read_file(path / "config.yaml", "model"))
    restore.load_model(path, chunks)
    return chunks[0].eval()


def logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, vocab]` of ids `[batch, seq]`."""
    with torch.no_grad():
        return model(ids, torch.arange(ids.size(1)).expand_as(ids), None)
