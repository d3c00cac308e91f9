"""Autoregressive decoding with megatron-core's key/value cache, in the layout that the model has.

Every rank calls with the same tokens: tensor and expert parallelism work as in training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from configs.schema import ParallelConfig
from pangu import backends
from pangu.inference.sampling import Sampler

_NO_TOKEN = -1


class NotFinite(ArithmeticError):
    """A model whose predictions are no numbers: nothing can be drawn from them."""


def obstacle(parallel: ParallelConfig) -> str:
    """Why a model in this layout cannot generate; "" when it can."""
    if parallel.pipeline_model_parallel_size > 1:
        return "generation needs the whole model on every rank: pipeline_model_parallel_size=1"
    if parallel.context_parallel_size > 1:
        return "generation needs whole sequences on every rank: context_parallel_size=1"
    return ""


class Decoder:
    """One sequence that grows, with its keys and values cached.

    `max_length` counts all tokens it may hold.
    """

    def __init__(self, model: GPTModel, max_length: int) -> None:
        self._model = model
        config = model.config
        # Sequence parallelism wants sequences that divide: what fills them up lies behind the
        # last token, where causal attention does not look and the next token writes over it.
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        capacity = math.ceil(max_length / self._multiple) * self._multiple + self._multiple
        self._cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=capacity)
        self._cache.materialize_only_last_token_logits = self._multiple == 1
        self._max_length = max_length

    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens and return the logits `[vocab]` of the one after them.

        Raises:
            ValueError: the sequence would be longer than `max_length`.
        """
        count, start = len(tokens), self._cache.sequence_len_offset
        if start + count > self._max_length:
            raise ValueError(f"{start + count} tokens do not fit into {self._max_length}")
        device = backends.current().device
        padded = math.ceil(count / self._multiple) * self._multiple
        ids = torch.tensor([[*tokens, *[0] * (padded - count)]], device=device)
        positions = torch.arange(start, start + padded, device=device)[None]
        with torch.no_grad(), _for_inference(self._model):
            logits = self._model(
                ids,
                positions,
                None,
                inference_context=self._cache,
                runtime_gather_output=True,
            )
        self._cache.increment_sequence_len_offset(count)
        return logits[0, -1 if self._multiple == 1 else count - 1]


@contextlib.contextmanager
def _for_inference(model: GPTModel) -> Iterator[None]:
    """Evaluation mode, without the multi-token prediction heads, which only train."""
    training, mtp = model.training, model.mtp_process
    layers = model.config.mtp_num_layers
    model.eval()
    model.mtp_process, model.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        model.mtp_process, model.config.mtp_num_layers = mtp, layers
        model.train(training)


def generate(
    model: GPTModel,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    vocab_size: int,
    eod: int | None = None,
) -> Iterator[int]:
    """New tokens, one by one, until `eod` (which is not yielded) or `max_new_tokens`.

    `prompt` has one token at least. Tokens from `vocab_size` on, which fill up the model's
    vocabulary, are never drawn. Collective: rank 0 draws for all.

    Raises:
        NotFinite: on every rank, when rank 0 finds a logit that is no finite number.
    """
    decoder = Decoder(model, len(prompt) + max_new_tokens)
    tokens: Sequence[int] = prompt
    for _ in range(max_new_tokens):
        logits = decoder.feed(tokens)[:vocab_size]
        finite = bool(torch.isfinite(logits).all())
        token = _from_rank_0(sampler(logits) if finite else _NO_TOKEN)
        if token == _NO_TOKEN:
            raise NotFinite("the model's predictions are not finite numbers")
        if token == eod:
            return
        yield token
        tokens = [token]


def _from_rank_0(token: int) -> int:
    chosen = torch.tensor([token], device=backends.current().device)
    dist.broadcast(chosen, 0)
    return int(chosen)
