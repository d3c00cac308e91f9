"""The MoE feed-forward layer alone, forward and backward, on one thread: this project's beside
transformers' and a dense layer with as many floating-point operations. float32 on a CPU.

    python -m benchmarks.moe_layer

Rows are interleaved in one run and timed in CPU seconds of this process; the best of the rounds
counts, as others only ever slow it down.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.schema import Config, ModelConfig, MoEConfig, RouterType
from pangu.engines.megatron.fitting import select_backend

ROUNDS = 12


@dataclass(frozen=True)
class Shape:
    """`tokens` of `hidden` width through `top_k` of `experts` experts of `width`."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, hidden {self.hidden}, {self.experts} experts of width "
            f"{self.width}, top-{self.top_k}"
        )


SHAPES = [Shape(2048, 256, 64, 64, 8), Shape(1024, 256, 128, 32, 4)]


def ours(shape: Shape, router: RouterType) -> torch.nn.Module:
    """This project's layer, with the paper's auxiliary loss."""
    from megatron.core.transformer.spec_utils import build_module

    from pangu.model.transformer_config import transformer_config
    from pangu.moe.layer import moe_layer_spec

    model = ModelConfig(
        name="layer",
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=4,
        vocab_size=16,
        num_experts=shape.experts,
        moe_ffn_hidden_size=shape.width,
    )
    moe = MoEConfig(router=router, num_expert_groups=shape.top_k, top_k=shape.top_k)
    settings = transformer_config(Config(model=model, moe=moe))
    layer = build_module(moe_layer_spec(settings), config=settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return layer.train()


def transformers_block(shape: Shape, implementation: str) -> torch.nn.Module:
    """Qwen3-MoE's block."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return block.train()


class Dense(torch.nn.Module):
    """A SwiGLU MLP as wide as the chosen experts together."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width * shape.top_k
        self.up = torch.nn.Linear(shape.hidden, 2 * width, bias=False)
        self.down = torch.nn.Linear(width, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)


def step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One forward and backward, gradients included."""
    upstream = torch.randn_like(x)

    def run() -> None:
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(upstream)

    return run


def measure(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Least CPU seconds of each."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(ROUNDS):
        for name, run in steps.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def report(shape: Shape) -> None:
    """Print tokens per CPU-second and the ratio to transformers' grouped_mm."""
    x = torch.randn(shape.tokens, 1, shape.hidden, requires_grad=True)
    layers = {
        "pangu, moge": ours(shape, "moge"),
        "pangu, top_k": ours(shape, "top_k"),
        "transformers, grouped_mm": transformers_block(shape, "grouped_mm"),
        "transformers, eager": transformers_block(shape, "eager"),
        "dense, equal FLOPs": Dense(shape),
    }
    seconds = measure({name: step(layer, x) for name, layer in layers.items()})
    baseline = seconds["transformers, grouped_mm"]
    print(f"\n{shape}")
    for name, value in seconds.items():
        print(f"  {name:26} {shape.tokens / value:9.0f} tokens/s   {baseline / value:5.2f} x")


def main() -> None:
    torch.set_num_threads(1)
    select_backend("cpu")
    from megatron.core import parallel_state

    store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()
    for shape in SHAPES:
        report(shape)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
