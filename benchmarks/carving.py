"""Experts carved out of a real model: SmolLM2-135M, real text.

    python benchmarks/carving.py [S3A3E8 S2A2E8/2 …]

Perplexity of `random.py` by the experts of a token (`/2`: in two groups), and what carving takes;
calibrated on other modules of Python's library. A table in docs/compression.md is its output.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from compression_ladder import model_folder, texts_of

from pangu.compression.texts import judge, table
from pangu.trained_model import loaded

WAYS = [*(f"S3A{active}E8" for active in range(1, 6)), "S1A5E8", "S2A2E8", "S2A2E8/2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=WAYS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--judged", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    cache = Path(__file__).parent.parent / ".cache"
    folder = model_folder(cache)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        texts = texts_of(Path(work), options.tokens, options.window)
        judged, rows = replace(texts, tokens=options.judged), []
        with loaded(folder) as trained:
            rows.append(judge("dense", trained, judged, iter))
        for way in options.ways:
            from pangu.compression.carving import measured, write
            from pangu.weights.carve import parts_of

            name, _, groups = way.partition("/")
            parts, target = parts_of(name, int(groups or 1)), Path(work) / "carved"
            began, busy = time.monotonic(), time.process_time()
            with loaded(folder) as trained:
                carvings = measured(trained, parts, texts, iter)
            write(folder, target, parts, carvings)
            took, busy = time.monotonic() - began, time.process_time() - busy
            with loaded(target) as trained:
                rows.append(judge(way, trained, judged, iter))
            shutil.rmtree(target)
            print(f"{table(rows, judged)}\n{way}: {took:.0f} s, {busy:.0f} of a core", flush=True)


if __name__ == "__main__":
    main()
