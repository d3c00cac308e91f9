"""What the modules of the MoE layer are told: megatron-core's configuration and `moe` of ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import MLATransformerConfig

from configs.schema import MoEConfig


@dataclass
class MoETransformerConfig(MLATransformerConfig):
    """megatron-core's configuration with the part of our tree that routers and dispatchers read.

    One class serves GQA and MLA; `multi_latent_attention` tells them apart.
    """

    moe: MoEConfig = field(default_factory=MoEConfig)
