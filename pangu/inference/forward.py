"""A pass of the model over tokens of several sequences, with keys and values from a cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel

from configs.schema import ParallelConfig
from pangu import backends
from pangu.inference.cached_pass import CachedPass, nothing_cached
from pangu.inference.replicas import Replica
from pangu.ops.packed_weights import PackedWeights, using


def obstacle(parallel: ParallelConfig) -> str:
    """Why a model in this layout cannot generate; "" when it can."""
    if parallel.pipeline_model_parallel_size > 1:
        return "generation needs the whole model on every rank: pipeline_model_parallel_size=1"
    if parallel.context_parallel_size > 1:
        return "generation needs whole sequences on every rank: context_parallel_size=1"
    return ""


class Forward:
    """Logits of a model's next tokens. Every rank calls with the same tokens: tensor and expert
    parallelism work as in training. With `replica` that is so for the ranks of each replica."""

    def __init__(self, model: GPTModel, replica: Replica | None = None) -> None:
        self.model, self._replica = model, replica
        self._rotary = [m for m in model.modules() if isinstance(m, RotaryEmbedding)]
        config = model.config
        # Sequence parallelism wants sequences that divide: what fills them up is not cached.
        self._multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        # Beside the weights themselves, on a machine that others use too.
        self.packed = PackedWeights(
            backends.current().total_memory_bytes // 4 // dist.get_world_size()
        )
        self._kinds: list[int] = []  # of passes: the model's, and of each layer that guesses
        if replica:
            self._kinds.append(replica.register(self._idle))
            for depth in range(1, self.depths + 1):
                self._kinds.append(replica.register(partial(self._idle_further, depth)))

    def __call__(self, tokens: Sequence[int], cached: CachedPass) -> torch.Tensor:
        """Logits `[rows, vocab]` of the rows of `cached`, whose segments `tokens` belong to."""
        size = len(tokens) + -len(tokens) % self._multiple
        return self._pass(tokens, cached, self._turn(0, size))

    def _turn(self, kind: int, size: int) -> int:
        return self._replica.turn(self._kinds[kind], size) if self._replica else size

    def _pass(self, tokens: Sequence[int], cached: CachedPass, size: int) -> torch.Tensor:
        """Of `size` tokens: those that fill it up are not cached."""
        filling = size - len(tokens)
        ids = torch.tensor([*tokens, *[0] * filling], device=backends.current().device)[None]
        positions = torch.nn.functional.pad(cached.positions, (0, filling))
        with self._inference(positions):
            return self.model(ids, positions[None], cached)

    def _idle(self, size: int) -> None:
        self._pass([], nothing_cached(), size)

    def agreed(self, tokens: Sequence[int]) -> list[int]:
        """What the first of the ranks that decode the same has drawn, on all. Collective."""
        if self._replica:
            return self._replica.agreed(tokens)
        if dist.get_world_size() == 1:
            return list(tokens)
        chosen = torch.tensor(tokens, device=backends.current().device)
        dist.broadcast(chosen, 0)
        return chosen.tolist()

    @property
    def leaps(self) -> tuple[int, int]:
        """Heads that predict further, the model's own among them, and their stride; (0, 1) for
        none, or where a rank has a part of the sequence."""
        heads = getattr(self.model, "leap_heads", None)
        if heads is None or self._multiple > 1:
            return 0, 1
        return len(heads) + 1, self.model.config.model.leap_stride

    def leap(self, head: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[r, 1, H]` → logits `[r, vocab]` of leap head `head` (from 1)."""
        with torch.no_grad(), using(self.packed):
            return self.model.leap_logits(head, hidden)

    @property
    def depths(self) -> int:
        """Layers of multi-token prediction that can guess: none where a rank has a part of the
        sequence."""
        mtp = getattr(self.model, "mtp", None)
        return len(mtp.layers) if mtp is not None and self._multiple == 1 else 0

    def predict_further(
        self, depth: int, hidden: torch.Tensor, tokens: Sequence[int], cached: CachedPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `depth` (from 1) of multi-token prediction, as arXiv 2412.19437, section 2.2:
        hidden states `[s, 1, H]` of the depth before at the positions of `cached`, and the tokens
        `depth` positions on → its hidden states, and logits `[rows, vocab]` of the tokens
        `depth + 1` positions on."""
        size = self._turn(depth, len(tokens))
        return self._pass_further(depth, hidden, tokens, cached, size)

    def _pass_further(
        self,
        depth: int,
        hidden: torch.Tensor,
        tokens: Sequence[int],
        cached: CachedPass,
        size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model, filling = self.model, size - len(tokens)
        positions = torch.nn.functional.pad(cached.positions, (0, filling))
        ids = torch.tensor([[*tokens, *[0] * filling]], device=positions.device)
        with self._inference(positions):
            angles = None
            if model.position_embedding_type == "rope" and not model.config.multi_latent_attention:
                angles = model.rotary_pos_emb(size)
            # The layer's own forward moves the tokens of one whole sequence along.
            hidden = model.mtp.layers[depth - 1]._proj_and_transformer_layer(
                hidden_states=torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, filling)),
                decoder_input=model.embedding(ids, positions[None] + depth),
                attention_mask=cached,
                rotary_pos_emb=angles,
            )[: len(tokens)]
            return hidden, model.row_logits(hidden, cached.rows)

    def _idle_further(self, depth: int, size: int) -> None:
        weight = self.model.embedding.word_embeddings.weight
        hidden = weight.new_zeros(0, 1, self.model.config.hidden_size)
        self._pass_further(depth, hidden, [], nothing_cached(), size)

    @contextlib.contextmanager
    def _inference(self, positions: torch.Tensor) -> Iterator[None]:
        with (
            torch.no_grad(),
            for_inference(self.model),
            self._positions(positions),
            using(self.packed),
        ):
            yield

    @contextlib.contextmanager
    def _positions(self, positions: torch.Tensor) -> Iterator[None]:
        """Rotary embeddings give the angles of these positions, not of 0, 1, 2 …"""

        def angles(module: RotaryEmbedding, arguments: Any, output: Any) -> torch.Tensor:
            # As a power of two: the module remembers the tables that it was asked for.
            longest = 2 ** math.ceil(math.log2(int(positions.max()) + 1))
            return module.forward(longest)[positions]

        hooks = [module.register_forward_hook(angles) for module in self._rotary]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def whole_logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """Without a cache: ids `[batch, seq]` → logits `[batch, seq, vocab]`, float32."""
    ids = ids.to(backends.current().device)
    positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    with for_inference(model):
        return model(ids, positions, None).float()


class Enough(Exception):
    """Raised by a hook that has what it wants of a pass."""


def until_enough(model: GPTModel, ids: torch.Tensor) -> None:
    """`whole_logits` for hooks' sake alone, as far as the one that raises `Enough`."""
    with torch.no_grad(), contextlib.suppress(Enough):
        whole_logits(model, ids)


@contextlib.contextmanager
def for_inference(model: GPTModel) -> Iterator[None]:
    """Evaluation mode, without the multi-token prediction heads, which only train."""
    training, mtp = model.training, model.mtp_process
    if training:
        model.eval()
    model.mtp_process = False
    try:
        yield
    finally:
        model.mtp_process = mtp
        if training:
            model.train()
