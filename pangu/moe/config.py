"""What the modules of the MoE layer are told: megatron-core's configuration and `moe` of ours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from configs.schema import MoEConfig


@dataclass(frozen=True)
class StepTokens:
    """What the losses of a step are means over, counted over all ranks before its first
    micro-batch: float32 on the device, so that the host need not wait.

    `trained` `[]` counts the tokens of the main loss, by which the engine divides every gradient;
    `mtp` `[depths]` those that each depth of multi-token prediction, or each leap head beside the
    model's own, has a label for.
    """

    trained: torch.Tensor
    mtp: torch.Tensor
    micro_batches: int

    @property
    def per_micro_batch(self) -> torch.Tensor:
        """Turns the gradient of a micro-batch's mean into an addend of the step's: `[]`."""
        return self.trained / self.micro_batches

    @property
    def mtp_factors(self) -> torch.Tensor:
        """Turn sums of multi-token prediction's losses into means over their own tokens, once the
        engine has divided by `trained`: `[depths]`."""
        return self.trained / self.mtp.clamp(min=1)


@dataclass
class MoETransformerConfig(MLATransformerConfig):
    """megatron-core's configuration with the part of our tree that routers and dispatchers read.

    One class serves GQA and MLA; `multi_latent_attention` tells them apart.
    """

    moe: MoEConfig = field(default_factory=MoEConfig)
    activation_bits: int = 0  # of what comes into linears and experts; 0: as it is
    input_transforms: bool = False  # it passes a learned matrix first
    lora_rank: int = 0  # of the adapters beside `lora_modules`; 0: there are none
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0
    lora_modules: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()  # modules, of `memory.recompute_modules`
    step: StepTokens | None = None  # of the step under way; None where no engine counts

    @property
    def rounds_inputs(self) -> bool:
        """Whether anything is done to what comes into linears."""
        return self.activation_bits > 0 or self.input_transforms
