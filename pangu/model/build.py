"""Build the model chunks of this rank."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

from configs.schema import Config
from pangu import backends
from pangu.model.init import initialize
from pangu.model.layer_spec import block_spec, mtp_spec
from pangu.model.transformer_config import PanguTransformerConfig, transformer_config
from pangu.ops.cross_entropy import cross_entropy


class PanguModel(GPTModel):
    """megatron-core's GPT model, with a cross-entropy of its own where the vocabulary is whole."""

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """labels `[batch, seq]`, logits `[seq, batch, vocab]` → losses `[batch, seq]`, at least
        float32. The engine's vocabulary-parallel form takes several passes over the logits."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        wide = logits if logits.dtype is torch.float64 else logits.float()
        losses = cross_entropy(wide.flatten(0, 1), labels.t().flatten())
        return losses.view(labels.size(1), labels.size(0)).t().contiguous()


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
    return chunks, settings


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
        if isinstance(module, MLP):  # the initialiser must know which matrices are two in one
            module.linear_fc1.weight.gated = settings.gated_linear_unit
    return chunk.to(backends.current().device)
