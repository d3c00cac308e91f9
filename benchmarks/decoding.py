"""Tokens per second of the decoding engine, of transformers' generate and of its continuous
batching: float32, greedy, the same prompts of 59 tokens and the same new ones, in turns in one
process.

    python -m benchmarks.decoding [--models SmolLM2 MoE] [--batches 1 8 32] [--new 32] [--rounds 3]
        [--threads 1 2] [--vllm PYTHON]

SmolLM2-135M as it is imported, and a MoE of ours with random weights (8 layers of 512, 32 experts
of 256 of which a token takes 4), exported for transformers. With one thread, processor seconds,
which hardly change when other programs run beside; with several, wall seconds. The best of the
rounds, of which the first warms up: an engine stands for all rounds, without prefix reuse. PYTHON:
an interpreter that has vLLM for CPUs, which decodes all cases of a model before the others do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from real_models import smollm2

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "
PAGE = 16
Way = Callable[[list[list[int]], list[int]], list[list[int]]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", nargs="+", default=["SmolLM2", "MoE"])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--new", type=int, default=32, help="tokens of an answer")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, nargs="+", default=[1])
    options.add_argument("--vllm", help="an interpreter")
    given = options.parse_args()
    from pangu.trained_model import loaded
    from pangu.weights.convert import export_model

    print("tokens a second; load at the start", " ".join(f"{each:.1f}" for each in os.getloadavg()))
    columns = "model | threads | batch | new tokens | generate | continuous | vLLM | ours"
    print(f"\n| {columns} | / generate | / continuous | / vLLM |")
    print("|---" * 11 + "|")
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
            {"SmolLM2": import_smollm2, "MoE": import_moe}[name](ours)
            with loaded(ours) as (model, tokenizer, config):
                export_model(ours, theirs)
                vocab = min(tokenizer.vocab_size, config.model.vocab_size)
                text = [token % vocab for token in tokenizer.encode(TEXT * 3)]
                for threads in given.threads:
                    torch.set_num_threads(threads)
                    compare(f"{name} | {threads}", model, theirs, text, vocab, given)


def import_smollm2(ours: Path) -> None:
    from pangu.weights.convert import import_model

    import_model(smollm2(), ours)


def import_moe(ours: Path) -> None:
    """Weights by transformers' initialisation, wide enough that texts are not one token for ever;
    SmolLM2's tokenizer."""
    import shutil

    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from pangu.weights.convert import export_model, import_model

    shape = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=256,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        initializer_range=0.05,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "moe")
        import_smollm2(folder / "other")
        export_model(folder / "other", folder / "text")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "text" / file, folder / "moe" / file)
        import_model(folder / "moe", ours)


def compare(
    name: str, model, theirs: Path, text: list[int], vocab: int, given: argparse.Namespace
) -> None:
    """A line for each batch size, and one for answers of mixed length."""
    from transformers import AutoModelForCausalLM

    # Continuous batching puts attention of its own into a model.
    both = [
        AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval() for _ in range(2)
    ]
    lengths = [(batch, [given.new] * batch) for batch in given.batches]
    most = max(given.batches)
    # Twice as many answers as fit into the batch, of a quarter to four times the length.
    lengths.append((most, [given.new * factor // 4 for factor in (1, 2, 4, 16)] * (most // 2)))
    cases = [
        Case(batch, [[(100 + number) % vocab, *text] for number in range(len(asked))], asked)
        for batch, asked in lengths
    ]
    vllm = by_vllm(given.vllm, theirs, cases, given.rounds) if given.vllm else None
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for place, case in enumerate(cases):
        ways: list[Way] = [
            by_generate(both[0], case.batch),
            by_continuous_batching(both[1], case.room),
            by_engine(model, vocab, case.batch, case.room),
        ]
        best = [float("inf")] * len(ways)
        texts: list[list[list[int]]] = [[] for _ in ways]
        for _ in range(given.rounds):
            for number, way in enumerate(ways):
                start = clock()
                texts[number] = way(case.prompts, case.lengths)
                best[number] = min(best[number], clock() - start)
        if vllm:
            best.insert(2, vllm[place]["seconds"])
            texts.insert(2, vllm[place]["texts"])
        speeds = [f"{sum(case.lengths) / seconds:.1f}" for seconds in best]
        gains = [f"{seconds / best[-1]:.2f}" for seconds in best[:-1]]
        if not vllm:
            speeds.insert(2, "")
            gains.append("")
        parted = [sum(a != b for a, b in zip(other, texts[-1], strict=True)) for other in texts]
        note = f" texts that part from ours: {parted[:-1]}" if any(parted) else ""
        row = " | ".join([f"{case.batch} | {case.told}", *speeds, *gains])
        print(f"| {name} | {row} |{note}", flush=True)


class Case(NamedTuple):
    """Prompts of one length, and how many tokens are to follow each; so many at a time."""

    batch: int
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def room(self) -> int:
        """Tokens of a cache that has all of a batch."""
        return self.batch * (len(self.prompts[0]) + max(self.lengths) + PAGE)

    @property
    def told(self) -> str:
        least, most = min(self.lengths), max(self.lengths)
        return f"{least}–{most}" if least < most else str(most)


def by_generate(model, batch: int) -> Way:
    """In batches, each until its longest answer is there. Prompts are of one length: there is no
    padding."""

    def way(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
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

    return way


def by_continuous_batching(model, room: int) -> Way:
    """With a cache of `room` tokens; as it comes, it takes most of the machine's memory for it, and
    attends to all of that."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=-(-room // PAGE), max_batch_tokens=512, allow_block_sharing=False
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def way(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        with model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=settings, warmup=False
        ) as running:
            asked = [
                running.add_request(prompt, max_new_tokens=length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            while len(found) < len(asked):
                result = running.get_result(timeout=60)
                if result is not None:
                    found[result.request_id] = list(result.generated_tokens)
                elif not running.is_running():
                    raise RuntimeError("continuous batching has stopped")
        return [found[number] for number in asked]

    return way


def by_vllm(python: str, model: Path, cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Of each case the best seconds, and the texts."""
    given = {
        "model": str(model),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cases": [case._asdict() for case in cases],
    }
    script = Path(__file__).with_name("vllm_decoding.py")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(given, file)
        file.flush()
        command = [python, str(script), file.name]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def by_engine(model, vocab: int, batch: int, room: int) -> Way:
    from pangu.inference.batching import Request
    from pangu.inference.engine import Engine
    from pangu.inference.sampling import Sampling

    engine = Engine(
        model, vocab_size=vocab, cache_tokens=room, max_sequences=batch, prefix_reuse=False
    )
    greedy = Sampling(temperature=0)

    def way(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for prompt, length in zip(prompts, lengths, strict=True):
            found[engine.add(Request(tuple(prompt), length, greedy))] = []
        while engine.busy:
            for update in engine.step():
                found[update.number] += update.tokens
        return list(found.values())

    return way


if __name__ == "__main__":
    main()
