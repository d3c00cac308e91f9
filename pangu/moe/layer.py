"""The MoE layer: router → dispatcher → experts → combine, plus the shared expert."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.dispatch import DISPATCHERS, resolve
from pangu.moe.experts import GroupedExperts
from pangu.moe.router import ExpertRouter


class ExpertLayer(MoELayer):
    """Megatron-core's MoE layer with the dispatcher of `config.moe`."""

    def __init__(
        self,
        config: PanguTransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, groups)
        kind = resolve(config.moe, groups.ep.size(), groups.expt_tp.size())
        dispatcher: Any = DISPATCHERS[kind]
        self.token_dispatcher = dispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
        )


def moe_layer_spec(config: PanguTransformerConfig) -> ModuleSpec:
    """What takes the place of the MLP in an MoE layer of `config`."""
    shared = ModuleSpec(
        module=SharedExpertMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=ExpertLayer,
        submodules=MoESubmodules(
            experts=GroupedExperts,
            shared_experts=shared if config.moe_shared_expert_intermediate_size else None,
            router=ExpertRouter,
        ),
    )
