"""Models of ours in a folder, in this process. Not in `tiny.py`, whose own text the tests read."""

from pathlib import Path

import pytest
import torch
from gloo import leave, single
from megatron.core.models.gpt import GPTModel

from configs.compose import read_file
from pangu.checkpoint import restore
from pangu.compression.quantization import rotated
from pangu.model.build import build_model
from pangu.weights.quantize import Scheme
from pangu.weights.quantize_layers import Quantizer


def load_ours(path: Path) -> GPTModel:
    single()
    chunks, _ = build_model(read_file(path / "config.yaml", "model"))
    restore.load_model(path, chunks)
    return chunks[0].eval()


def logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, vocab]` of ids `[batch, seq]`."""
    with torch.no_grad():
        return model(ids, torch.arange(ids.size(1)).expand_as(ids), None)


def turned_and_scaled(
    folder: Path, out: Path, ids: torch.Tensor, group: int, monkeypatch: pytest.MonkeyPatch
) -> GPTModel:
    """The model after SmoothQuant, here without rounding, in groups of `group` channels. That and
    QuaRot's rotation, which is written at `out`, leave its function as it was."""
    before = logits(load_ours(folder), ids)
    leave()
    turned = logits(load_ours(rotated(folder, out)), ids)
    assert (turned - before).abs().max() <= 1e-4
    monkeypatch.setattr(Quantizer, "_round", lambda *_: None)
    model = load_ours(folder)
    Quantizer("smoothquant", Scheme("", 4, 0, group), torch.float32).run(model, list(ids))
    assert (logits(model, ids) - before).abs().max() <= 1e-4
    return model
