"""When drafts pay: MoESD's speed-up (arXiv 2505.19645, equation 4) from this simulator's times.

A round drafts γ tokens of each of B sequences, verifies them and the token before them in one pass
of the model (γ + 1 tokens; the paper writes T_T(B, γ)), and keeps σ(γ + 1) of them:

    speed-up = σ(γ + 1) · T_T(B, 1) / (γ · T_D(B, 1) + T_T(B, γ) + T_reject)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.array import Array, Mask
from simulator.decoding_host import touched_experts
from simulator.inference import (
    decode_step,
    draft_seconds,
    memory_bytes,
    rejection_seconds,
    usable_bytes,
)
from simulator.moesd import popularity_at, sigma
from simulator.serving import Serving


@dataclass(frozen=True)
class Speculation:
    """Seconds of a round's parts and of plain decoding; arrays over batch and draft length."""

    draft_tokens: Array
    sigma: Array
    plain: Array  # T_T(B, 1)
    verify: Array  # T_T(B, γ)
    draft: Array  # T_D(B, 1), of one token of every sequence
    rejection: Array  # T_reject

    @property
    def round(self) -> Array:
        """Seconds of a round."""
        return self.draft_tokens * self.draft + self.verify + self.rejection

    @property
    def speedup(self) -> Array:
        """Tokens per second over those of plain decoding."""
        return self.sigma * (self.draft_tokens + 1.0) * self.plain / self.round

    @property
    def target_efficiency(self) -> Array:
        """T_T(B, 1) / T_T(B, γ): what workload and architecture leave of the gain, whatever the
        draft."""
        return self.plain / self.verify


def speculate(
    serving: Serving, batch: Array, draft_tokens: Array, context: Array | None = None
) -> Speculation:
    """Rounds of `draft_tokens` for `batch` sequences in all, with `context` cached positions each
    (the prompt and half of the output unless given). Arguments broadcast."""
    options = serving.options
    if context is None:
        context = options.mean_context
    gamma = np.asarray(draft_tokens, dtype=float)
    plain = decode_step(serving, batch, context).seconds
    shape = np.broadcast_shapes(np.shape(batch), gamma.shape, np.shape(context))
    return Speculation(
        draft_tokens=gamma,
        sigma=sigma(options.acceptance_rate, gamma),
        plain=np.broadcast_to(plain, shape),
        verify=decode_step(serving, batch, context, 1.0 + gamma).seconds,
        draft=np.broadcast_to(draft_seconds(serving, batch, context), shape),
        rejection=rejection_seconds(serving, batch, gamma),
    )


@dataclass(frozen=True)
class Curve:
    """Speculation over `batch` for one machine, number of experts per token and draft length.
    `active` are the experts that a verifying pass wakes in a layer, None of a dense model."""

    serving: Serving
    draft_tokens: int
    batch: np.ndarray
    times: Speculation
    active: Array | None
    fits: Mask

    @property
    def peak(self) -> int:
        """Where in `batch` drafts pay most."""
        return int(np.argmax(self.times.speedup))


def curve(serving: Serving, batch: np.ndarray, draft_tokens: int) -> Curve:
    """Rounds of `draft_tokens` for every batch."""
    model = serving.model
    active = None
    if model.num_experts:
        tokens = batch * (1.0 + draft_tokens)
        active = touched_experts(replace(serving, ep=1), tokens)
    times = speculate(serving, batch, draft_tokens)
    return Curve(serving, draft_tokens, batch, times, active, fits(serving, batch, draft_tokens))


def with_popularity(serving: Serving, chosen: np.ndarray) -> Serving:
    """Experts as popular as in a run, `chosen` being its probabilities `[layers, experts]` under
    any number of experts per token."""
    moe = serving.moe
    groups = moe.equal_groups
    return replace(serving, chosen=popularity_at(chosen, moe.top_k, groups))


def fits(serving: Serving, batch: Array, draft_tokens: int) -> Mask:
    """Whether `batch` sequences and their drafts fit the devices' memory."""
    options = replace(serving.options, draft_tokens=draft_tokens)
    drafting = replace(serving, config=replace(serving.config, inference=options))
    return memory_bytes(drafting, batch) <= usable_bytes(serving)


def with_top_k(config: Config, top_k: int) -> Config:
    """The model with another number of experts for each token, as the paper varies it.

    Raises:
        ConfigError: it has no experts, fewer, or cannot take as many from each group.
    """
    experts, groups = config.model.num_experts, config.moe.num_expert_groups
    if not experts:
        reason = f"{config.model.name} has no experts"
    elif not 1 <= top_k <= experts:
        reason = f"must be from 1 to the {experts} experts"
    elif config.moe.router == "moge" and top_k % groups:
        reason = f"must be a multiple of the {groups} groups"
    else:
        return replace(config, moe=replace(config.moe, top_k=top_k))
    raise ConfigError([Violation("--top-k", top_k, reason)])


def dense_twin(config: Config) -> Config:
    """The dense model whose tokens use as many parameters: one MLP as wide as the experts that a
    token chooses and the shared one."""
    model = config.model
    width = config.moe.top_k * model.moe_ffn_hidden_size + model.shared_expert_ffn_hidden_size
    dense = replace(
        model,
        name=f"{model.name}, dense",
        num_experts=0,
        moe_ffn_hidden_size=0,
        shared_expert_ffn_hidden_size=0,
        num_dense_layers=0,
        ffn_hidden_size=width,
    )
    parallel = replace(config.parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    return replace(config, model=dense, parallel=parallel)
