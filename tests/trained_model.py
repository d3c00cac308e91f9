"""A tiny model with every feature that adds a parameter, its optimizer, and steps on given
micro-batches, for tests that look at parameters, gradients and what a step changes."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from configs.compose import load
from configs.schema import Config

EVERYTHING = [
    "model.hidden_size=32",
    "model.kv_channels=8",
    "model.num_layers=2",
    "model.vocab_size=64",
    "model.num_dense_layers=1",
    "model.ffn_hidden_size=48",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=16",
    "model.shared_expert_ffn_hidden_size=16",
    "model.add_qkv_bias=true",
    "model.add_attention_output_bias=true",
    "model.qk_layernorm=true",
    "model.sandwich_norm=true",
    "model.tie_embeddings=false",
    "model.mtp_num_layers=1",
    "moe=bias_balanced",
    "moe.router_scale=true",
    "moe.top_k=2",
    "moe.num_expert_groups=1",
    "data=synthetic",
    "train.seq_length=16",
    "train.global_batch_size=4",
    "backend=cpu",
]


@dataclass
class Trained:
    config: Config
    engine: Any

    @property
    def chunks(self) -> list[Any]:
        return self.engine.chunks

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.chunks[0].module.named_parameters())

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> Any:
        """One step on this rank's micro-batches."""
        from pangu.engines.contract import StepShape

        size, length = micro_batches[0]["tokens"].shape
        shape = StepShape(len(micro_batches), size, length)
        return self.engine.train_step(iter(micro_batches), shape)()


def build(overrides: list[str], world_size: int = 1) -> Trained:
    """The model and its optimizer in the processes of `gloo.run`, or of `gloo.single`."""
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.training.run import build_engine

    warnings.filterwarnings("ignore")
    config = load([*EVERYTHING, f"launch.processes={world_size}", *overrides])
    parallel_state.destroy_model_parallel()
    process_groups.initialize(config)
    engine = build_engine(config)
    engine.set_learning_rate(config.optimizer.lr)
    return Trained(config, engine)


def micro_batch(seed: int, trained: float = 1.0, size: int = 1, length: int = 16, vocab: int = 64):
    """Random tokens; a fraction of the positions, chosen at random, is trained on."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (size, length + 1), generator=generator)
    mask = torch.zeros(size, length)
    for row in mask:
        row[torch.randperm(length, generator=generator)[: round(trained * length)]] = 1.0
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
    }
