"""Leap heads against plain multi-token prediction: how well each head knows its token, and what it
brings, greedy, float32.

    python -m benchmarks.leap RUN… --corpus PREFIX [--prompts 32] [--new 96] [--batches 1 8 32]

Prompts are pieces of 64 tokens of PREFIX.bin; of one process, in processor seconds of one thread.
f(i) is the part of a head's tokens that are right, i positions on, in the model's own answers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

PROMPT = 64  # tokens


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", type=Path, nargs="+")
    options.add_argument("--corpus", type=Path, required=True)
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--new", type=int, default=96)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    given = options.parse_args()
    from pangu.trained_model import loaded

    tokens = np.fromfile(given.corpus.with_suffix(".bin"), dtype=np.uint16)
    starts = np.random.default_rng(0).integers(0, len(tokens) - PROMPT, given.prompts)
    prompts = [tokens[start : start + PROMPT].tolist() for start in starts]
    for run in given.runs:
        with loaded(run) as (model, tokenizer, config):
            torch.set_num_threads(1)
            heads, stride = config.model.leap_heads, config.model.leap_stride
            print(f"{run.name}: {heads} heads, stride {stride}")
            texts, _, _ = decode(model, tokenizer.vocab_size, prompts, given.new, 32, 0)
            print("  f(i):", knowledge(model, prompts, texts, heads, stride))
            lengths = sorted({0, 1, 3, stride * (heads - 1)})
            for batch in given.batches:
                compare(
                    model, tokenizer.vocab_size, prompts[: 4 * batch], given.new, batch, lengths
                )


def compare(model, vocab: int, prompts, new: int, batch: int, lengths: list[int]) -> None:
    """A line for each number of guesses."""
    plain, speeds = None, {}
    for guesses in lengths:
        texts, seconds, counts = decode(model, vocab, prompts, new, batch, guesses)
        plain = plain or texts
        assert texts == plain, "speculation has changed a text"
        speeds[guesses] = len(prompts) * new / seconds
        found = " ".join(f"{part:.2f}" for part in counts.measured.report()["acceptance"])
        tokens = counts.tokens / counts.passes / batch
        print(
            f"  batch {batch:2}, {guesses} guesses: {speeds[guesses]:7.1f} tokens/s, "
            f"x{speeds[guesses] / speeds[0]:.2f}, "
            f"{tokens:.2f} a pass, held {found}",
            flush=True,
        )


def decode(model, vocab: int, prompts, new: int, batch: int, guesses: int):
    """The answers, processor seconds, and the engine's counts."""
    from pangu.inference.batching import Request
    from pangu.inference.engine import Engine
    from pangu.inference.sampling import Sampling

    room = batch * (PROMPT + new + 16)
    engine = Engine(model, vocab_size=vocab, cache_tokens=room, max_sequences=batch)
    if guesses:
        engine.draft_by_itself()
        engine.draft_tokens = min(engine.draft_tokens, guesses)
    found: dict[int, list[int]] = {}
    start = time.process_time()
    for prompt in prompts:
        found[engine.add(Request(tuple(prompt), new, Sampling(temperature=0)))] = []
    while engine.busy:
        for update in engine.step():
            found[update.number] += update.tokens
    return list(found.values()), time.process_time() - start, engine.counts


def knowledge(model, prompts, texts, heads: int, stride: int) -> str:
    """How often each head is right in the answers, by its distance."""
    ids = torch.tensor([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    states: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        model(ids, torch.arange(ids.size(1)).expand_as(ids), None)
    hook.remove()
    found = []
    for head in range(1, heads):
        distance = stride * head + 1
        rows = states[0][PROMPT - 1 : ids.size(1) - distance]  # [positions, batch, H]
        with torch.no_grad():
            guesses = model.leap_logits(head, rows.flatten(0, 1)[:, None]).argmax(dim=1)
        right = guesses.view(rows.shape[:2]).t() == ids[:, PROMPT - 1 + distance :]
        found.append(f"f({distance}) = {right.double().mean():.3f}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
