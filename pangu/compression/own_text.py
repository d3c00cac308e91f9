"""Calibration text that the model itself has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pangu.trained_model import Trained


def own_text(trained: Trained, tokens: int, window: int) -> str:
    """About `tokens` tokens in pieces of `window`, each drawn from the model's own distribution
    from the token on that ends a document; the same every time."""
    from pangu.inference.batching import Request
    from pangu.inference.engine import Engine
    from pangu.inference.sampling import Sampling

    model, tokenizer = trained.model, trained.tokenizer
    pieces = -(-tokens // window)
    together = min(pieces, 64)
    engine = Engine(
        model,
        vocab_size=tokenizer.vocab_size,
        cache_tokens=together * (window + 16),
        max_sequences=together,
    )
    for seed in range(pieces):
        engine.add(Request((tokenizer.eod,), window, Sampling(seed=seed)))
    texts: dict[int, list[int]] = {}
    while engine.busy:
        for update in engine.step():
            texts.setdefault(update.number, []).extend(update.tokens)
    return "\n".join(tokenizer.decode(ids) for _, ids in sorted(texts.items()))
