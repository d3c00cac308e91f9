"""What compressing a real model costs: SmolLM2-135M, real text.

    python benchmarks/compression_ladder.py layers [--taught 16384 --learning-rate 1e-3]
    python benchmarks/compression_ladder.py weights
    python benchmarks/compression_ladder.py cache | rotation | learned | commands
    python benchmarks/compression_ladder.py weights --model RUN --texts CALIBRATION JUDGED

Perplexity of `random.py`; calibrated, and taught, on other modules of Python's library. A table in
docs/compression.md is its output.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
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
LADDERS = {
    "weights": LADDER,
    "cache": tuple(
        (f"W16A16KV{bits}", "rtn", keys) for bits in (8, 4, 3) for keys in ("token", "channel")
    ),
    "rotation": tuple(
        (scheme, "rtn", "token", rotate)
        for scheme in ("W8A8", "W4A16", "W4A8", "W4A4")
        for rotate in (False, True)
    ),
    "learned": (("W4A4", "flatquant", "token", False, 2),),
}


def weights(folder: Path, work: Path, texts: Texts, tokens: int, ladder: Sequence) -> None:
    """Perplexity by scheme, method and keys; calibrated on twice as many tokens as are judged."""
    rows = []
    judged = replace(texts, tokens=tokens)
    with loaded(folder) as trained:
        rows.append(judge("float", trained, judged, iter))
    for scheme, method, *more in ladder:
        from pangu.compression.quantization import Rounding, rotated, rounded, scheme_for, write

        began = time.monotonic()
        target, source = work / f"{scheme}-{method}", folder
        rounding = Rounding(scheme, method, 128, *more)
        if rounding.rotate:
            source = rotated(folder, work / "rotated")
        with loaded(source, input_transforms=rounding.transforms) as trained:
            grid = scheme_for(trained.model, rounding)
            quantizer = rounded(trained, source, grid, rounding, texts, iter)
            write(source, target, trained.model, quantizer)
        shutil.rmtree(work / "rotated", ignore_errors=True)
        took = time.monotonic() - began
        with loaded(target) as trained:
            rows.append(judge(" ".join(map(str, (scheme, method, *more))), trained, judged, iter))
        shutil.rmtree(target)
        print(f"{table(rows, judged)}\n{scheme} {method}: {took:.0f} s", flush=True)


def commands(folder: Path, work: Path, texts: Texts) -> dict[str, list[object]]:
    """Words of each command; experts are pruned from the model that was carved before."""
    calibrated = ["--calibration", texts.calibration, "--tokens", texts.tokens]
    calibrated += ["--window", texts.window]
    rows: dict[str, list[object]] = {"convert import": ["pangu.convert", "import", smollm2()]}
    rows["convert export"] = ["pangu.convert", "export", folder]
    judged = ["--text", texts.judged_by, *calibrated[2:]]
    rows["evaluate"] = ["pangu.evaluate", folder, *judged]
    pruning = ["pangu.compress", "prune-layers", folder, "--layers", 3, *calibrated]
    rows["prune-layers"] = pruning
    rows["prune-layers --distill"] = [*pruning, "--distill", "--distill-tokens", 4096]
    rows["carve"] = ["pangu.compress", "carve", folder, "--experts", "S3A3E8", *calibrated]
    some = ["--keep", 0.6, "--task", *calibrated[1:]]
    rows["prune-experts"] = ["pangu.compress", "prune-experts", work / "carve", *some]
    quantise = ["pangu.compress", "quantize", folder, *calibrated]
    for scheme, method in (("W4A16", "rtn"), ("W4A16", "awq"), ("W4A16", "gptq")):
        rows[f"quantize {method}"] = [*quantise, "--scheme", scheme, "--method", method]
    rows["quantize smoothquant"] = [*quantise, "--scheme", "W8A8", "--method", "smoothquant"]
    words = [*quantise, "--scheme", "W4A4", "--method", "flatquant", "--epochs", 2]
    rows["quantize flatquant"] = words
    rows["quantize rtn --rotate"] = [*quantise, "--scheme", "W4A16", "--rotate"]
    return rows


def measure(rows: dict[str, list[object]], work: Path) -> None:
    """Seconds of processor and peak memory of each command, a process of its own."""
    print(f"{'':24}{'CPU s':>8}{'peak GiB':>10}")
    for name, words in rows.items():
        out = work / name.replace(" ", "-")
        whole = [sys.executable, "-m", *map(str, words)]
        whole += [] if name == "evaluate" else ["--out", str(out)]
        process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
        print(f"{name:24}{seconds:8.0f}{peak:10.2f}{'' if not status else '  failed'}", flush=True)
        if name != "carve":
            shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", choices=["layers", "commands", *LADDERS], default="layers"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--taught", type=int, default=0, help="tokens to distil on")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--model", type=Path, help="another model than SmolLM2")
    parser.add_argument("--texts", type=Path, nargs=2, help="to calibrate on, and to judge by")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        cache = Path(__file__).parent.parent / ".cache"
        folder = options.model or model_folder(cache)
        texts = texts_of(Path(work), options.tokens, options.window)
        if options.texts:
            calibration, judged_by = options.texts
            texts = replace(texts, calibration=calibration, judged_by=judged_by)
        if options.what == "layers":
            layers(folder, Path(work), texts, options.taught, options.learning_rate)
        elif options.what == "commands":
            measure(commands(folder, Path(work), texts), Path(work))
        else:
            twice = replace(texts, tokens=2 * options.tokens)
            weights(folder, Path(work), twice, options.tokens, LADDERS[options.what])
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
