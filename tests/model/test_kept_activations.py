"""What autograd keeps from the forward to the backward pass: recomputation and swap of each module
release the bytes that the simulator counts for it."""

import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
from gloo import run

from configs.compose import load
from configs.schema import RecomputeModule

# Shaped like Pangu Ultra MoE, a dense layer and one of experts. Values as wide as keys: others are
# padded for torch's attention (the simulator's `padded_values`).
MODEL = [
    "model.num_layers=2",
    "model.num_dense_layers=1",
    "model.hidden_size=256",
    "model.ffn_hidden_size=640",
    "model.vocab_size=512",
    "model.num_attention_heads=16",
    "model.attention=mla",
    "model.q_lora_rank=64",
    "model.kv_lora_rank=48",
    "model.qk_head_dim=32",
    "model.qk_pos_emb_head_dim=16",
    "model.v_head_dim=48",
    "model.qk_layernorm=true",
    "model.sandwich_norm=true",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=96",
    "model.shared_expert_ffn_hidden_size=96",
    "moe.top_k=4",
    "moe.num_expert_groups=4",
    "data=synthetic",
    "train.seq_length=256",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "backend=cpu",
    "backend.precision=fp32",
]
POLICIES = {
    "none": [],
    **{
        name: ["memory=selective", f"memory.recompute_modules=[{name}]"]
        for name in get_args(RecomputeModule)
    },
    "full": ["memory=full"],
    "moe_fc1 in chunks": [
        *["memory=selective", "memory.recompute_modules=[moe_fc1]", "moe.dispatch_chunks=3"],
    ],
    "swap moe in chunks": ["memory.swap=[moe]", "moe.dispatch_chunks=2"],
    **{f"swap {name}": [f"memory.swap=[{name}]"] for name in get_args(RecomputeModule)},
    "both": [
        "memory=selective",
        "memory.recompute_modules=[layernorm,moe_permute]",
        "memory.swap=[core_attn,mla_up_proj,mlp,moe_act,moe_fc1,shared_experts]",
    ],
}


def kept_bytes(overrides: list[str]) -> int:
    """Bytes of the distinct storages that a forward pass leaves to autograd in the layers,
    parameters excluded."""
    import gloo
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model
    from pangu.offload.attach import swap_activations

    warnings.filterwarnings("ignore")
    config = load([*MODEL, *overrides])
    process_groups.initialize(config)
    model = build_model(config)[0][0]
    swap = None
    if config.memory.swap:
        swap = swap_activations([model], config.memory, Path(config.run_dir))
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, StorageWeakRef] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in parameters:
            kept[storage._cdata] = StorageWeakRef(storage)
        return tensor

    if swap is not None:  # its hooks are the inner ones: what they are given counts while it lives
        packed = swap.pack
        swap.pack = lambda tensor: packed(pack(tensor))
    inside: list[bool] = []
    model.decoder.register_forward_pre_hook(lambda *_: inside.append(True))
    model.decoder.final_layernorm.register_forward_pre_hook(lambda *_: inside.clear())
    length = config.train.seq_length
    tokens = torch.randint(0, 512, (1, length))
    mask = torch.ones(1, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, torch.arange(length)[None], None, labels=tokens, loss_mask=mask)
    while swap is not None and swap._leaving:
        swap._let_go(swap._leaving.popleft())
    # Recomputed outputs have given up their storage by now.
    size = sum(_nbytes(each) for each in kept.values() if not each.expired())
    del loss
    gloo.drop_groups()
    return size


def _nbytes(reference: Any) -> int:
    import torch

    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata).nbytes()


def measured() -> tuple[dict[str, int], int]:
    found = {name: kept_bytes(overrides) for name, overrides in POLICIES.items()}
    return found, kept_bytes(["moe.dispatch_chunks=3"])


def counted(overrides: list[str]) -> float:
    """The simulator's count of the same."""
    from simulator.layout import from_config
    from simulator.parts import prepare

    config = load([*MODEL, "hardware=h100", *overrides])
    kept = prepare(config, from_config(config)).kept
    if config.memory.recompute_granularity == "full":
        return 2 * float(kept.checkpoint)
    return float(kept.dense) + float(kept.moe)


@pytest.mark.distributed
def test_each_module_releases_what_the_simulator_counts():
    found, in_chunks = run(1, measured)[0]
    whole = counted([])
    assert found["none"] == pytest.approx(whole, rel=0.03)
    assert in_chunks == pytest.approx(found["none"], rel=0.003)
    for name, size in found.items():
        released = whole - counted(POLICIES[name])
        assert found["none"] - size == pytest.approx(released, rel=0.03), name
