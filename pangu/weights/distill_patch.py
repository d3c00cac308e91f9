"""Distillation of a patch (LinearPatch, section 3.4): the pruned model learns the likeliest K
tokens of the whole one; nothing but its patches changes.

Shapes: N windows, S tokens of a window, K logits, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from pangu import backends
from pangu.checkpoint import WeightsError
from pangu.inference.forward import whole_logits

Progress = Callable[[Iterable], Iterable]
_INDICES, _LOGITS = "indices.npy", "logits.npy"


def store_logits(
    model: GPTModel, ids_NS: torch.Tensor, k: int, folder: Path, progress: Progress = iter
) -> None:
    """Write the K largest logits of every position and their tokens: 8·K bytes for each.

    Raises:
        WeightsError: the disk has no room for them.
    """
    shape = (*ids_NS.shape, k)
    indices = _room(folder / _INDICES, np.int32, shape)
    logits = _room(folder / _LOGITS, np.float32, shape)
    for row in progress(range(len(ids_NS))):
        with torch.no_grad():
            top = whole_logits(model, ids_NS[row, None])[0].topk(k, dim=-1)
        indices[row], logits[row] = top.indices.cpu().numpy(), top.values.cpu().numpy()
    indices.flush()
    logits.flush()


def _room(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new array on the disk, all of whose bytes are there: a page that finds no room when it is
    written to ends the process."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        size = 4 * math.prod(shape) / 2**30
        raise WeightsError(
            f"--distill: no room for {size:.2g} GiB of logits beside --out ({error.strerror}); "
            "fewer --distill-tokens or a smaller --top take less"
        ) from None
    return array


def distill(
    model: GPTModel,
    ids_NS: torch.Tensor,
    folder: Path,
    learning_rate: float = 1e-4,
    progress: Progress = iter,
) -> dict[str, torch.Tensor]:
    """One epoch over the windows, one window a step, AdamW: the patches in float32, by name.

    The loss is the mean over positions of KL(p ‖ q): p is the teacher's softmax over its K logits
    in `folder`, q the student's over its logits of the same tokens.
    """
    patches = {n: p for n, p in model.named_parameters() if n.endswith("layer_patch.weight")}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Main copies: in bfloat16 a step of 1e-4 of a number near 1 would be lost.
    mains = {name: weight.detach().float().clone() for name, weight in patches.items()}
    for weight in patches.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(mains.values(), lr=learning_rate, weight_decay=0.0)
    indices = np.load(folder / _INDICES, mmap_mode="r", allow_pickle=False)
    logits = np.load(folder / _LOGITS, mmap_mode="r", allow_pickle=False)
    device = backends.current().device
    for row in progress(range(len(ids_NS))):
        chosen = torch.from_numpy(indices[row].astype(np.int64)).to(device)
        teacher = torch.from_numpy(logits[row].copy()).to(device)
        loss = top_k_divergence(whole_logits(model, ids_NS[row, None])[0], chosen, teacher)
        for weight in patches.values():
            weight.grad = None
        loss.backward()
        for name, weight in patches.items():
            mains[name].grad = weight.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, weight in patches.items():
                weight.copy_(mains[name])
    return {name: main.detach().cpu() for name, main in mains.items()}


def top_k_divergence(
    student_SV: torch.Tensor, chosen_SK: torch.Tensor, teacher_SK: torch.Tensor
) -> torch.Tensor:
    """Mean over positions of KL(softmax(teacher) ‖ softmax(student at the chosen tokens))."""
    log_p = teacher_SK.log_softmax(-1)
    log_q = student_SV.gather(-1, chosen_SK).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
