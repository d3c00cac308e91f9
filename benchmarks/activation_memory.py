"""What a stack shaped like Pangu Ultra MoE keeps for its backward pass, module by module: as it is,
recomputed, swapped, and the best of both. float32 on a CPU, one thread beside the one that copies.

    python benchmarks/activation_memory.py

Policies take turns within each round. Bytes are of storages that live between the passes; seconds
are of a forward and a backward pass, the best of the rounds: of the wall, and of the computing
thread's processor.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from configs.compose import load
from pangu.engines.megatron.fitting import select_backend

ROUNDS = 4
# Ratios of widths as in Pangu Ultra MoE (7680: heads 128 x 192/128, ranks 1536/512, 8 x 2048).
MODEL = [
    "model=pangu_ultra_moe",
    "model.num_layers=4",
    "model.num_dense_layers=1",
    "model.mtp_num_layers=0",
    "model.hidden_size=480",
    "model.ffn_hidden_size=1152",
    "model.vocab_size=512",
    "model.num_attention_heads=8",
    "model.q_lora_rank=96",
    "model.kv_lora_rank=32",
    "model.qk_head_dim=128",
    "model.qk_pos_emb_head_dim=64",
    "model.v_head_dim=128",
    "model.num_experts=32",
    "model.moe_ffn_hidden_size=128",
    "model.shared_expert_ffn_hidden_size=128",
    "data=synthetic",
    "train.seq_length=1024",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "backend=cpu",
    "backend.precision=fp32",
]
MODULES = ["layernorm", "mla_up_proj", "moe_permute", "moe_act", "moe_fc1", "shared_experts", "mlp"]
BOTH = "recompute layernorm+moe_permute, swap core_attn+mla_up_proj+mlp+moe_act+moe_fc1+shared"
POLICIES = {
    "nothing": [],
    **{
        f"recompute {name}": ["memory=selective", f"memory.recompute_modules=[{name}]"]
        for name in MODULES
    },
    **{f"swap {name}": [f"memory.swap=[{name}]"] for name in ("core_attn", *MODULES)},
    BOTH: [
        "memory=selective",
        "memory.recompute_modules=[layernorm,moe_permute]",
        "memory.swap=[core_attn,mla_up_proj,mlp,moe_act,moe_fc1,shared_experts]",
    ],
    "swap all": ["memory.swap=[core_attn,layernorm,mla_up_proj,mlp,moe]"],
    "recompute whole layers": ["memory=full"],
}


class Seconds(NamedTuple):
    wall: float
    thread: float


class Stack:
    """A model under one policy."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        from pangu.model.build import build_model
        from pangu.offload.attach import swap_activations

        config = load([*MODEL, *overrides])
        self.model: Any = build_model(config)[0][0]
        self.swap = None
        if config.memory.swap:
            self.swap = swap_activations([self.model], config.memory, folder)
        length = config.train.seq_length
        tokens = torch.randint(0, 512, (1, length))
        self.inputs = tokens, torch.arange(length)[None], None
        self.labels = {"labels": tokens, "loss_mask": torch.ones(1, length)}
        self.parameters = {each.untyped_storage()._cdata for each in self.model.parameters()}

    def step(self) -> Seconds:
        start, thread = time.perf_counter(), time.thread_time()
        self.model(*self.inputs, **self.labels).sum().backward()
        return Seconds(time.perf_counter() - start, time.thread_time() - thread)

    def kept(self) -> int:
        """Bytes that a forward pass leaves to the backward pass."""
        from torch.multiprocessing.reductions import StorageWeakRef

        seen: dict[int, StorageWeakRef] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.parameters:
                seen[storage._cdata] = StorageWeakRef(storage)
            return tensor

        if self.swap is not None:
            packed = self.swap.pack
            self.swap.pack = lambda tensor: packed(pack(tensor))  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(*self.inputs, **self.labels)
        while self.swap is not None and self.swap._leaving:
            self.swap._let_go(self.swap._leaving.popleft())
        living = [each.cdata for each in seen.values() if not each.expired()]
        size = sum(torch.UntypedStorage._new_with_weak_ptr(each).nbytes() for each in living)
        if self.swap is not None:
            self.swap.pack = packed  # type: ignore[method-assign]
        del loss
        return size


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    select_backend("cpu")
    from pangu.engines.megatron import process_groups

    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        process_groups.initialize(load(MODEL))
        stacks = {name: Stack(policy, Path(folder)) for name, policy in POLICIES.items()}
        kept = {name: stack.kept() for name, stack in stacks.items()}
        steps: dict[str, list[Seconds]] = {name: [] for name in stacks}
        for _ in range(ROUNDS):
            for name, stack in stacks.items():
                steps[name].append(stack.step())
        dist.destroy_process_group()
    print(f"{'kept MB':>9} {'saved':>6} {'wall ms':>8} {'more':>6} {'thread ms':>9} {'more':>6}")
    first = [min(seconds[i] for seconds in steps["nothing"]) for i in (0, 1)]
    for name, seconds in steps.items():
        wall, thread = (min(each[i] for each in seconds) for i in (0, 1))
        saved, size = 1 - kept[name] / kept["nothing"], kept[name] / 1e6
        print(
            f"{size:9.1f} {saved:6.0%} {wall * 1e3:8.0f} {wall / first[0] - 1:+6.0%} "
            f"{thread * 1e3:9.0f} {thread / first[1] - 1:+6.0%}  {name}"
        )


if __name__ == "__main__":
    main()
