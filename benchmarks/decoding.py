"""Tokens per second of the decoding engine and of transformers' generate: SmolLM2-135M, float32,
greedy, the same prompts and the same tokens, in turns in one process.

    python -m benchmarks.decoding [--batches 1 8 32] [--new 32] [--rounds 3]

Times are processor seconds of one thread, the best of the rounds: they hardly change when other
programs run beside, as wall time does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from real_models import smollm2

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--new", type=int, default=32, help="tokens of an answer")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    from pangu.trained_model import loaded
    from pangu.weights.convert import export_model, import_model

    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Path(name) / "ours", Path(name) / "theirs"
        import_model(smollm2(), ours)
        with loaded(ours) as (model, tokenizer, _):
            export_model(ours, theirs)
            torch.set_num_threads(1)
            compare(model, tokenizer, theirs, given)


def compare(model, tokenizer, theirs: Path, given: argparse.Namespace) -> None:
    """A line for each batch size, and one for answers of mixed length."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    text = tokenizer.encode(TEXT * 3)
    print("tokens a processor second: batch, new tokens, transformers, ours, ours / theirs")
    cases = [(batch, [given.new] * batch) for batch in given.batches]
    most = max(given.batches)
    # Twice as many answers as fit into the batch, of a quarter to four times the length.
    cases.append((most, [given.new * factor // 4 for factor in (1, 2, 4, 16)] * (most // 2)))
    for batch, lengths in cases:
        prompts = [[100 + number, *text] for number in range(len(lengths))]
        ways: dict[str, Way] = {
            "theirs": lambda p, n, b: by_transformers(reference, p, n, b),
            "ours": lambda p, n, b: by_engine(model, tokenizer, p, n, b),
        }
        best = dict.fromkeys(ways, float("inf"))
        texts = {}
        for _ in range(given.rounds):
            for who, way in ways.items():
                start = time.process_time()
                texts[who] = way(prompts, lengths, batch)
                best[who] = min(best[who], time.process_time() - start)
        parted = sum(a != b for a, b in zip(*texts.values(), strict=True))
        speed = {who: sum(lengths) / seconds for who, seconds in best.items()}
        told = f"{min(lengths)}–{max(lengths)}" if min(lengths) < max(lengths) else lengths[0]
        note = f"  ({parted} texts part)" if parted else ""
        print(
            f"{batch:5}  {told:>8}  {speed['theirs']:7.1f}  {speed['ours']:7.1f}"
            f"  {speed['ours'] / speed['theirs']:5.2f}{note}",
            flush=True,
        )


Way = Callable[[list[list[int]], list[int], int], list[list[int]]]


def by_transformers(
    model, prompts: list[list[int]], lengths: list[int], batch: int
) -> list[list[int]]:
    """In batches, each until its longest answer is there. Prompts are of one length: there is no
    padding."""
    found = []
    for first in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[first : first + batch])
        wanted = lengths[first : first + batch]
        with torch.no_grad():
            rows = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max(wanted),
                eos_token_id=None,
                pad_token_id=0,
            )[:, ids.size(1) :]
        found += [row[:length].tolist() for row, length in zip(rows, wanted, strict=True)]
    return found


def by_engine(
    model, tokenizer, prompts: list[list[int]], lengths: list[int], batch: int
) -> list[list[int]]:
    from pangu.inference.batching import Request
    from pangu.inference.engine import Engine
    from pangu.inference.sampling import Sampling

    engine = Engine(
        model,
        vocab_size=tokenizer.vocab_size,
        cache_tokens=batch * (len(prompts[0]) + max(lengths) + 16),
        max_sequences=batch,
    )
    greedy = Sampling(temperature=0)
    found: dict[int, list[int]] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        found[engine.add(Request(tuple(prompt), length, greedy))] = []
    while engine.busy:
        for update in engine.step():
            found[update.number] += update.tokens
    return list(found.values())


if __name__ == "__main__":
    main()
