"""The router module: logits, routing functions, losses and the count of who was chosen.

Shapes: S positions, B sequences, T = S·B tokens of this rank, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import Router

from pangu.moe.config import MoETransformerConfig
from pangu.moe.load import LayerLoad
from pangu.moe.losses import Terms, attach, balance_gradient
from pangu.moe.parts import ExpertParts
from pangu.moe.routing import routing_for, softmax, within_capacity


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def router_logits(input_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """`[T, E]`, computed in at least float32."""
    dtype = router_dtype(input_TH.dtype)
    return torch.mm(input_TH.to(dtype), weight_EH.to(dtype).t())


class _RouterLogits(torch.autograd.Function):
    """`router_logits` that keeps its input as it came, not a float32 copy."""

    @staticmethod
    def forward(ctx: Any, input_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input_TH, weight_EH)
        return router_logits(input_TH, weight_EH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        input_TH, weight_EH = ctx.saved_tensors
        (grad_TE,) = grads
        grad_input = torch.mm(grad_TE, weight_EH.to(grad_TE.dtype))
        grad_weight = torch.mm(grad_TE.t(), input_TH.to(grad_TE.dtype))
        return grad_input.to(input_TH.dtype), grad_weight.to(weight_EH.dtype)


def _gated(input_TH: torch.Tensor, gate_EH: torch.Tensor, up_EH: torch.Tensor) -> torch.Tensor:
    """|SiLU(x·W)·(x·U)| `[T, E]`."""
    gate_TE, up_TE = (_RouterLogits.apply(input_TH, weight) for weight in (gate_EH, up_EH))
    return (torch.nn.functional.silu(gate_TE) * up_TE).abs()


class ExpertRouter(Router):
    """Every kind of routing of `MoEConfig`, behind megatron-core's router contract:
    hidden states `[S, B, H]` → weights `[T, E]` (float32, 0 where unchosen) and map (bool).

    `functions` holds the three routing functions and may be replaced.
    """

    config: MoETransformerConfig
    weight: torch.nn.Parameter

    def __init__(self, config: MoETransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.bias = None  # no bias, whatever the model's other linear layers have
        self.load = LayerLoad(self.num_experts)
        self.parts: ExpertParts | None = None
        if config.moe.expert_parts:  # what follows is about whole experts
            self.parts = ExpertParts(config)
            self.num_experts //= config.moe.expert_parts
            whole: Any = torch.nn.Parameter(self.weight.data[: self.num_experts].clone())
            whole.sequence_parallel = config.sequence_parallel
            self.weight = whole
        self.functions = routing_for(config.moe)
        self.gated = config.moe.score_function == "gated"
        if self.gated:
            up: Any = torch.nn.Parameter(torch.empty_like(self.weight))
            up.sequence_parallel = config.sequence_parallel
            self.up_weight = up
        self.ep_group = pg_collection.ep
        # The ranks over which the tokens of one micro-batch are spread.
        self.token_group = self.tp_cp_group if config.sequence_parallel else self.cp_group
        self.router_scale = None
        if config.moe.router_scale:
            initial = torch.zeros if self.gated else torch.ones
            scale: Any = torch.nn.Parameter(initial(self.num_experts, dtype=config.params_dtype))
            scale.sequence_parallel = config.sequence_parallel
            self.router_scale = scale
        self.expert_bias: torch.Tensor | None = None
        self.local_tokens_per_expert: torch.Tensor | None = None
        if config.moe.expert_bias:
            # pangu.moe.balancing_bias reads the counts and moves the bias.
            zeros = torch.zeros(self.num_experts, dtype=torch.float32)
            del self.expert_bias, self.local_tokens_per_expert
            self.register_buffer("expert_bias", zeros)
            self.register_buffer("local_tokens_per_expert", zeros.clone(), persistent=False)
        self._batch_counts: torch.Tensor | None = None  # of this global batch so far

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[T, E]` → weights and map, both `[T, E]`."""
        if self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            # Casting the model to bfloat16 takes the buffer along; its steps are too fine for that.
            self.expert_bias.data = self.expert_bias.data.float()
        weights_TE, chosen_TE = self.functions(logits, self.expert_bias)
        if self.router_scale is not None:
            scale_E = self.router_scale.to(weights_TE.dtype)
            if self.gated:
                scale_E = 1 + softmax(logits) * scale_E
            weights_TE = weights_TE * scale_E
        return weights_TE, chosen_TE

    def logits(self, input_TH: torch.Tensor) -> torch.Tensor:
        """`[T, E]`, at least float32: x·W, or gated |SiLU(x·W)·(x·U)|, which is how far the one
        neuron that speaks for an expert is activated (arXiv 2502.04416)."""
        if self.gated:
            return _gated(input_TH, self.weight, self.up_weight)
        return _RouterLogits.apply(input_TH, self.weight)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route hidden states `[S, B, H]`.

        Raises:
            ValueError: a padding mask is given; every token is routed.
        """
        if padding_mask is not None:
            raise ValueError("padding masks are not supported: every token is routed")
        input_TH = input.flatten(0, 1)
        logits_TE = self.logits(input_TH)
        weights_TE, chosen_TE = self.routing(logits_TE)
        # Under recomputation the forward runs twice; the run with gradients is the one that counts.
        counts = self.training and torch.is_grad_enabled()
        whole_TE = chosen_TE
        if counts:
            chosen_SBE = chosen_TE.unflatten(0, input.shape[:2])
            weights_TE = self._with_losses(weights_TE, logits_TE, input_TH, chosen_SBE)
        if self.parts is not None:
            logits = _gated(input_TH, self.parts.weight, self.parts.up_weight)
            weights_TE, chosen_TE = self.parts(logits, weights_TE, chosen_TE)
        moe = self.config.moe
        if moe.capacity_factor and self.training:  # answers must not depend on who else asks
            chosen_TE = within_capacity(weights_TE, chosen_TE, moe.capacity_factor, moe.top_k)
            weights_TE = weights_TE.masked_fill(~chosen_TE, 0.0)
        if counts:
            self._record_choices(chosen_TE, whole_TE)
        return weights_TE, chosen_TE

    def _record_choices(self, chosen_TE: torch.Tensor, whole_TE: torch.Tensor) -> None:
        self.load.counts += chosen_TE.sum(dim=0)
        self.load.losses[2] += 1 / self.token_group.size()
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert += whole_TE.sum(dim=0)

    def _with_losses(
        self,
        weights_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        input_TH: torch.Tensor,
        chosen_SBE: torch.Tensor,
    ) -> torch.Tensor:
        moe = self.config.moe
        if not moe.aux_loss_coefficient and not moe.z_loss_coefficient:
            return weights_TE
        positions, sequences = chosen_SBE.shape[:2]
        tokens = positions * sequences * self.token_group.size()
        with torch.no_grad():
            counts = self._scope_counts(chosen_SBE).to(logits_TE.dtype)
            score_gradient = balance_gradient(counts, moe.aux_loss_coefficient, tokens)
        terms = Terms(
            shape=(positions, sequences),
            score_function=moe.score_function,
            z_coefficient=moe.z_loss_coefficient,
            tokens=tokens,
            factor=self._factor(tokens),
            logits=router_logits,
            record=self._record_losses,
        )
        return attach(
            weights_TE,
            logits_TE=logits_TE,
            input_TH=input_TH,
            weight_EH=self.weight,
            score_gradient=score_gradient,
            terms=terms,
        )

    def _factor(self, tokens: int) -> float | torch.Tensor:
        """What the engine divides by, over the number of micro-batches."""
        if self.config.step is not None:
            return self.config.step.per_micro_batch
        return float(tokens) if self.calculate_per_token_loss else 1.0

    def _scope_counts(self, chosen_SBE: torch.Tensor) -> torch.Tensor:
        """The choices that the auxiliary loss counts: `[E]`, or `[B, E]` per sequence."""
        scope = self.config.moe.aux_loss_scope
        counts = chosen_SBE.sum(dim=0)
        if scope != "sequence":
            counts = counts.sum(dim=0)
        _sum_over(self.token_group, counts)
        if scope == "ep_group":
            _sum_over(self.ep_group, counts)
        elif scope == "dp_group":
            _sum_over(parallel_state.get_data_parallel_group(), counts)
        elif scope == "global_batch":
            return self._with_earlier_micro_batches(counts)
        return counts

    def _with_earlier_micro_batches(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Counts of this micro-batch and those before it in the global batch's order."""
        group = parallel_state.get_data_parallel_group()
        side_by_side = counts_E.new_zeros(group.size(), counts_E.numel())
        side_by_side[group.rank()] = counts_E
        _sum_over(group, side_by_side)
        if self._batch_counts is None:
            self._batch_counts = torch.zeros_like(counts_E)
        prefix = self._batch_counts + side_by_side[: group.rank() + 1].sum(dim=0)
        self._batch_counts += side_by_side.sum(dim=0)
        return prefix

    def reset_global_aux_loss_tracker(self) -> None:
        """Begin a new global batch; megatron-core calls this at the end of each step where
        `moe_router_load_balancing_type` is "global_aux_loss"."""
        self._batch_counts = None

    def _record_losses(self, auxiliary: torch.Tensor, z: torch.Tensor) -> None:
        self.load.losses[0] += auxiliary
        self.load.losses[1] += z


def _sum_over(group: dist.ProcessGroup, counts: torch.Tensor) -> None:
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
