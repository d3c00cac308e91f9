"""Build the model chunks of this rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    mtp_on_this_rank,
    roll_tensor,
)

from configs.schema import Config
from pangu import backends
from pangu.model.head import Head, Targets, gives_losses
from pangu.model.init import initialize
from pangu.model.layer_spec import block_spec, mtp_spec
from pangu.model.leap_heads import LeapHeads, LeapTargets, leap_losses
from pangu.model.rope_scaling import scaled_frequencies
from pangu.model.transformer_config import PanguTransformerConfig, transformer_config
from pangu.ops.cross_entropy import cross_entropy, cross_entropy_triton, splits_vocabulary
from pangu.ops.linear import linear


class PanguModel(GPTModel):
    """megatron-core's GPT model, with a cross-entropy of its own where the vocabulary is whole, and
    leap heads beside its head.

    `mtp_sums` `[depths]`: what each depth of multi-token prediction, or each leap head, has lost
    since it was last zeroed, in nats, over this rank's tokens that have a label so far ahead.
    """

    config: PanguTransformerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = Head  # which the engine makes without asking for a class
        self.leap_heads: LeapHeads | None = None
        heads = self.config.model.leap_heads if self.config.model else 0
        if heads and self.post_process:
            self.leap_heads = LeapHeads(self.config, heads, self.vocab_size)
        self._leap_targets: LeapTargets | None = None  # of the call under way
        depths = self.config.mtp_num_layers or max(0, heads - 1)
        self.mtp_sums = torch.zeros(depths, dtype=torch.float64, device=backends.current().device)
        self._mtp_masks: list[torch.Tensor] = []  # of the call under way, one per depth

    def forward(
        self, *args: Any, leap_targets: LeapTargets | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """As the engine's; `leap_targets` are those of the heads beside the model's own."""
        self._leap_targets = leap_targets
        return super().forward(*args, **kwargs)

    def _postprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        keys = kwargs.get("attention_mask")
        if keys is not None and not isinstance(keys, torch.Tensor):
            keys.hidden = kwargs["hidden_states"]
            return self.row_logits(keys.hidden, keys.rows)
        depths = self.config.mtp_num_layers
        if depths and kwargs.get("labels") is None and not kwargs.get("mtp_in_postprocess"):
            # Logits alone: the engine would copy the labels of multi-token prediction all the same.
            self.config.mtp_num_layers = None
            try:
                return super()._postprocess(*args, **kwargs)
            finally:
                self.config.mtp_num_layers = depths
        self._look_ahead(kwargs.get("labels"), kwargs.get("loss_mask"))
        output = super()._postprocess(*args, **kwargs)
        if self.leap_heads is None or self._leap_targets is None or not self.training:
            return output
        return self._with_leap_losses(output, kwargs["hidden_states"], self._leap_targets)

    def _look_ahead(self, labels: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """Masks of each depth of multi-token prediction, and the targets of the head's calls: one
        for each depth, then the main one."""
        self._mtp_masks = []
        if labels is None or mask is None:
            return
        targets = [Targets(labels, mask)]
        for _ in range(self.config.mtp_num_layers or 0):
            ahead = [
                roll_tensor(tensor, shifts=-1, dims=-1, cp_group=self.cp_group)[0]
                for tensor in targets[-1]
            ]
            targets.append(Targets(*ahead))
        if self.training:
            self._mtp_masks = [each.weights for each in targets[1:]]
        if self.post_process and gives_losses(self.config.tensor_model_parallel_size):
            self.output_layer.targets = (*targets[1:], targets[0])

    def _with_leap_losses(
        self, output: torch.Tensor, hidden: torch.Tensor, targets: LeapTargets
    ) -> torch.Tensor:
        """The model's losses `[batch, seq]` as they are; the heads' exist in the backward alone.
        Each head's becomes a mean over its own labels, and all of them a mean over heads."""
        assert self.leap_heads is not None
        losses = leap_losses(self.leap_heads, hidden, targets, self.compute_language_model_loss)
        self.mtp_sums += torch.stack([each.detach().sum() for each in losses]).double()
        weight = self.config.mtp_loss_scaling_factor / len(losses)
        step = self.config.step
        for number, each in enumerate(losses):
            factor = 1.0 if step is None else step.mtp_factors[number].to(each.dtype)
            output = MTPLossAutoScaler.apply(output, each * weight * factor)
        return output

    def leap_logits(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[r, 1, H]` → logits `[r, vocab]` of leap head `number` (from 1), whole on
        every rank."""
        assert self.leap_heads is not None
        return self.leap_heads[number - 1](hidden, gather=True)[:, 0]

    def row_logits(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states `[s, 1, H]` → logits `[r, vocab]`, whole on every rank, of some tokens."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if not self.config.sequence_parallel:  # else the output layer gathers the sequence
            hidden_states = hidden_states[rows]
        head = self.output_layer
        if type(head) is ColumnParallelLinear and self.config.tensor_model_parallel_size == 1:
            return linear(hidden_states[:, 0], head.weight if weight is None else weight, head.bias)
        logits, _ = head(hidden_states, weight=weight, runtime_gather_output=True)
        return logits[rows, 0] if self.config.sequence_parallel else logits[:, 0]

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """labels `[batch, seq]`, logits `[seq, batch, vocab]` → losses `[batch, seq]`, at least
        float32; or what a head gave in the place of logits. The engine's vocabulary-parallel form
        takes several passes over the logits.

        megatron-core asks for the losses of each depth of multi-token prediction, then for the main
        one; the sum of each becomes a mean over its own labels, not over the main loss's.
        """
        split = self.config.tensor_model_parallel_size > 1
        if logits.dim() == 2:
            losses = logits
        elif split and not (splits_vocabulary() and logits.dtype != torch.float64):
            losses = super().compute_language_model_loss(labels, logits)
        else:
            rows, wanted = logits.flatten(0, 1), labels.t().flatten()
            losses = (
                cross_entropy_triton(rows, wanted, self.pg_collection.tp)
                if split
                else cross_entropy(rows, wanted)
            )
            losses = losses.view(labels.size(1), labels.size(0)).t().contiguous()
        if not self._mtp_masks:
            return losses
        depth = len(self.mtp_sums) - len(self._mtp_masks)
        self.mtp_sums[depth] += (losses.detach() * self._mtp_masks.pop(0)).sum()
        step = self.config.step
        return losses if step is None else losses * step.mtp_factors[depth].to(losses.dtype)


def build_model(config: Config) -> tuple[list[GPTModel], PanguTransformerConfig]:
    """The initialised chunks (one, or one per virtual pipeline stage) on this rank's device.

    Process groups must exist.
    """
    # The engine warns of every layer whose MLP is not its own ("Unknown MLP type").
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    settings = transformer_config(config)
    virtual = settings.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    chunks = [_build_chunk(config, settings, stage) for stage in stages]
    initialize(chunks, config.model, config.seed)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if config.train.leap_heads_only:
                parameter.requires_grad_(name.startswith("leap_heads."))
            elif config.model.lora_rank:
                parameter.requires_grad_(".lora_" in name)
        if config.model.lora_rank and settings.recompute_granularity and chunk.pre_process:
            chunk.embedding.register_forward_hook(_with_gradient)
    return chunks, settings


def _with_gradient(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
    """What is recomputed is passed over in the backward where none of its inputs has a gradient,
    whatever is trained inside: behind a frozen embedding, the first layer's adapters."""
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded


def _build_chunk(
    config: Config, settings: PanguTransformerConfig, vp_stage: int | None
) -> PanguModel:
    model = config.model
    virtual = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    chunk = PanguModel(
        config=settings,
        transformer_layer_spec=block_spec(settings, vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=max(model.max_position_embeddings, config.train.seq_length),
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope"
        if model.position_embedding == "rope"
        else "learned_absolute",
        rotary_base=model.rotary_base,
        mtp_block_spec=mtp_spec(settings, vp_stage)
        if mtp_on_this_rank(settings, ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        else None,
        vp_stage=vp_stage,
    )
    for module in chunk.modules():
        if isinstance(module, RotaryEmbedding):
            module.inv_freq = scaled_frequencies(module.inv_freq, model)
        if isinstance(module, MLP):  # the initialiser must know which matrices are two in one
            module.linear_fc1.weight.gated = settings.gated_linear_unit
    return chunk.to(backends.current().device)
