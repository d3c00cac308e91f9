"""Leap heads that learned from the model's own answers beside such that learned from its corpus:
the first of the two stages of docs/serving.md, by its commands, for strides 1 (plain multi-token
prediction) and 2, at four heads.

    python -m benchmarks.leap_answers [--work DIR] [--steps 500] [--head-steps 240]

A quick-start model of one process; answers are greedy. What DIR has already is not made again, and
`pangu.generate` goes on where it was stopped. f(i) and speed-ups: benchmarks/leap.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import leap

PROMPT, ANSWER, ANSWERS = 64, 192, 1200  # tokens, tokens, number
HEADS = 4
COMMON = [
    "experiment=quickstart",
    "launch.processes=1",
    "parallel.expert_model_parallel_size=1",
    "backend=cpu",
    "backend.threads=1",
    "train.micro_batch_size=8",
    "train.global_batch_size=8",
    "train.validate_every=0",
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--work", type=Path, default=Path("runs/leap_answers"))
    options.add_argument("--steps", type=int, default=500, help="of the model")
    options.add_argument("--head-steps", type=int, default=240, help="of the heads alone")
    given = options.parse_args()
    torch.set_num_threads(1)
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    made(work / "model", "pangu.train", *COMMON, f"train.steps={given.steps}")
    corpus = standard_library(work / "model")
    write_prompts(work / "prompts.jsonl", corpus)
    run("pangu.generate", f"checkpoint={work / 'model'}", f"prompts={work / 'prompts.jsonl'}",
        f"output={work / 'answers.jsonl'}", f"max_new_tokens={ANSWER}", "temperature=0",
        "backend=cpu")  # fmt: skip
    own = work / "own"
    if not own.exists():
        run("pangu.data.prepare", str(work / "answers.jsonl"), "--column", "document",
            "--tokenizer", str(corpus), "--output", str(own), "--workers", "1")  # fmt: skip
    for stride in (1, 2):
        for name, folder in (("own", own), ("corpus", corpus)):
            made(
                work / f"{name}-{stride}",
                "pangu.train",
                *COMMON,
                f"checkpoint.resume={work / 'model'}",
                "data=indexed",
                f"data.blend={{{folder}: 1}}",
                f"model.leap_heads={HEADS}",
                f"model.leap_stride={stride}",
                "train.leap_heads_only=true",
                f"train.steps={given.steps + given.head_steps}",  # goes on from there
                "optimizer.lr=1e-3",
                f"optimizer.warmup_steps={given.head_steps // 10}",
            )
    for stride in (1, 2):
        for name in ("own", "corpus"):
            judge(work / f"{name}-{stride}", corpus)


def run(*words: str) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    print(f"{words[0]}: {time.monotonic() - start:.0f} s", flush=True)


def made(run_dir: Path, *words: str) -> None:
    """A run, unless it is there to its end."""
    if not (run_dir / "done").exists():
        run(*words, f"run_dir={run_dir}")
        (run_dir / "done").touch()


def standard_library(run_dir: Path) -> Path:
    from pangu.data.stdlib import standard_library_folder
    from pangu.trained_model import read_run_config

    config = read_run_config(run_dir)
    return standard_library_folder(config.data.cache_dir, config.model.vocab_size)


def write_prompts(file: Path, corpus: Path) -> None:
    """Pieces of the training part."""
    from pangu.data.tokenizer import load_tokenizer

    if file.exists():
        return
    tokenizer = load_tokenizer(corpus)
    tokens = np.fromfile(corpus / "train.bin", dtype=np.uint16)
    starts = np.random.default_rng(1).integers(0, len(tokens) - PROMPT, ANSWERS)
    pieces = (tokenizer.decode(tokens[start : start + PROMPT].tolist()) for start in starts)
    file.write_text("".join(json.dumps({"prompt": piece}) + "\n" for piece in pieces))


def judge(run_dir: Path, corpus: Path) -> None:
    """How well heads know the model's own greedy answers to held-out beginnings, and what they
    bring."""
    from pangu.trained_model import loaded

    tokens = np.fromfile(corpus / "validation.bin", dtype=np.uint16)
    starts = np.random.default_rng(0).integers(0, len(tokens) - leap.PROMPT, 32)
    prompts = [tokens[start : start + leap.PROMPT].tolist() for start in starts]
    with loaded(run_dir, "cpu") as (model, tokenizer, config):
        torch.set_num_threads(1)
        heads, stride = config.model.leap_heads, config.model.leap_stride
        vocab = tokenizer.vocab_size
        texts, _, _ = leap.decode(model, vocab, prompts, 64, 32, 0)
        print(f"{run_dir.name}: {leap.knowledge(model, prompts, texts, heads, stride)}", flush=True)
        for batch in (1, 8):
            lengths = sorted({0, 1, 3, stride * (heads - 1)})
            leap.compare(model, vocab, prompts[: 4 * batch], 64, batch, lengths)


if __name__ == "__main__":
    main()
