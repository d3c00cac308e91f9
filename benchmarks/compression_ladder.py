"""What compressing a real model costs: SmolLM2-135M, real text.

    python benchmarks/compression_ladder.py layers [--taught 16384 --learning-rate 1e-3]
    python benchmarks/compression_ladder.py weights
    python benchmarks/compression_ladder.py cache

Perplexity of `random.py`; calibrated, and taught, on other modules of Python's library. A table in
docs/compression.md is its output.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from real_models import smollm2

from pangu.compression.texts import Texts, judge, table
from pangu.trained_model import loaded

MODULES = ("argparse", "inspect", "tarfile", "subprocess", "datetime", "logging/__init__")


def model_folder(cache: Path) -> Path:
    """The model as ours, imported once."""
    from pangu.weights.convert import import_model

    target = cache / "smollm2"
    if not target.is_dir():
        import_model(smollm2(), target)
    return target


def texts_of(work: Path, tokens: int, window: int) -> Texts:
    library = Path(sysconfig.get_paths()["stdlib"])
    text = work / "calibration.txt"
    text.write_text("\n".join((library / f"{name}.py").read_text() for name in MODULES))
    return Texts(text, tokens, window, Path(random.__file__))


def layers(folder: Path, work: Path, texts: Texts, taught: int, learning_rate: float) -> None:
    """Perplexity without 3, 5 and 7 layers, by patch; after distillation where `taught` tokens."""
    found, rows = {}, []
    teacher = work / "teacher"
    teacher.mkdir(exist_ok=True)
    with loaded(folder) as trained:
        from pangu.compression.layers import Choice, Distillation, measured, teach, write

        rows.append(judge("dense", trained, texts, iter))
        print(table(rows, texts), flush=True)
        distillation = Distillation(taught, 100, learning_rate)
        for count in (3, 5, 7):
            for patch in ("none", "diagonal", "hadamard"):
                choice = Choice(count, patch)
                start, matrix = measured(trained, choice, texts, iter)
                target = work / f"{count}-{patch}"
                write(folder, target, choice, (start, matrix))
                found[f"{count} from {start}, {patch}"] = target
        if taught:
            teach(trained, texts, distillation, teacher, iter)
    for name, target in found.items():
        with loaded(target) as trained:
            from pangu.compression.layers import learn

            rows.append(judge(name, trained, texts, iter))
            if taught and name.endswith("hadamard"):
                learn(trained, texts, distillation, teacher, iter)
                rows.append(judge("… distilled", trained, texts, iter))
        print(table(rows, texts), flush=True)


CACHE = tuple(
    (f"W16A16KV{bits}", "rtn", keys) for bits in (8, 4, 3) for keys in ("token", "channel")
)
LADDER = (
    ("W8A16", "rtn"),
    ("W4A16", "rtn"),
    ("W4A16", "gptq"),
    ("W4A16", "awq"),
    ("W3A16", "rtn"),
    ("W3A16", "gptq"),
    ("W8A8", "rtn"),
    ("W8A8", "smoothquant"),
)


def weights(folder: Path, work: Path, texts: Texts, tokens: int, ladder: Sequence) -> None:
    """Perplexity by scheme, method and keys; calibrated on twice as many tokens as are judged."""
    rows = []
    judged = replace(texts, tokens=tokens)
    with loaded(folder) as trained:
        rows.append(judge("float", trained, judged, iter))
    for scheme, method, *keys in ladder:
        from pangu.compression.quantization import Rounding, rounded, scheme_for, write

        began = time.monotonic()
        target = work / f"{scheme}-{method}"
        with loaded(folder) as trained:
            grid = scheme_for(trained.model, Rounding(scheme, method, 128, *keys))
            quantizer = rounded(trained, folder, grid, method, texts, iter)
            write(folder, target, trained.model, quantizer)
        took = time.monotonic() - began
        with loaded(target) as trained:
            rows.append(judge(" ".join((scheme, method, *keys)), trained, judged, iter))
        shutil.rmtree(target)
        print(f"{table(rows, judged)}\n{scheme} {method}: {took:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["layers", "weights", "cache"], default="layers")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--taught", type=int, default=0, help="tokens to distil on")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        cache = Path(__file__).parent.parent / ".cache"
        folder = model_folder(cache)
        texts = texts_of(Path(work), options.tokens, options.window)
        if options.what == "layers":
            layers(folder, Path(work), texts, options.taught, options.learning_rate)
        else:
            twice = replace(texts, tokens=2 * options.tokens)
            ladder = CACHE if options.what == "cache" else LADDER
            weights(folder, Path(work), twice, options.tokens, ladder)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
