"""Speed of the data path: `python benchmarks/data.py`.

Prints tokenising in MB of text per second, building the index of many files, and reading
sequences. Everything happens in a temporary folder; the text is Python's standard library.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from configs.compose import load
from pangu.data.corpus import Preparation, prepare
from pangu.data.datasets import batches, build_datasets

FILES, DOCUMENTS, SEQ, VOCAB = 200, 1000, 256, 4096


def main() -> None:
    """Run and print."""
    root = Path(tempfile.mkdtemp())
    try:
        library = Path(sysconfig.get_path("stdlib"))
        job = Preparation(
            [library],
            root / "library",
            train_tokenizer=VOCAB,
            pattern="*.py",
            workers=os.cpu_count() or 1,
        )
        seconds, info = timed(lambda: prepare(job))
        size = sum(info.text_bytes.values()) / 1e6
        print(f"prepare: {size:.0f} MB of text in {seconds:.1f} s, {job.workers} processes")

        overrides = [f"model.vocab_size={VOCAB}", "train.validate_every=0"]
        config = load(["data=indexed", f"data.cache_dir={root}", *overrides])
        config.data.blend = {str(root / "library"): 1.0}
        datasets = build_datasets(config, train_samples=1, validation_samples=0, seq_length=SEQ)
        stream = batches(
            datasets.train,
            config,
            data_parallel_rank=0,
            data_parallel_size=1,
            consumed_sequences=0,
            micro_batch_size=8,
        )
        seconds, count = timed(lambda: sum(1 for _ in stream))
        print(f"batches: {seconds / count / 8 * 1e6:.0f} µs per sequence of {SEQ} tokens")

        config.data.blend = many_files(root)
        for state in ("first", "again"):
            seconds, _ = timed(
                lambda: build_datasets(
                    config, train_samples=100_000, validation_samples=0, seq_length=SEQ
                )
            )
            print(f"index of {FILES} files, {state}: {seconds / FILES * 1e3:.1f} ms per file")
    finally:
        shutil.rmtree(root)


def many_files(root: Path) -> dict[str, float]:
    """Corpora of random tokens beside the library's tokenizer."""
    draw = np.random.default_rng(0)
    blend = {}
    for number in range(FILES):
        folder = root / str(number)
        folder.mkdir()
        for path in (root / "library").glob("tokenizer*"):
            shutil.copy(path, folder)
        builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
        for length in draw.integers(10, 200, DOCUMENTS).tolist():
            builder.add_document(draw.integers(0, VOCAB, length), [length])
        builder.finalize(str(folder / "train.idx"))
        blend[str(folder)] = 1.0 + number % 3
    return blend


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
