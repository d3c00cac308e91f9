"""Every scheme with every method, and each result's export: `python -m tests.drills.quantize`.
With words behind it, such as `experts`, `W4A8` or `awq`: what has all of them in its name alone.

A dense model (Llama) and an MoE (Qwen3-MoE) of two layers with random weights are quantised in all
the ways that `pangu.compress quantize --help` offers, groups of 16 columns where there are groups,
and what comes of it is exported. A table has the perplexity before and after, or the sentence of a
refusal. Exit code 1 if a way ends otherwise, or leaves something behind.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from compression.tiny import SETTINGS, compress, saved
from transformers import LlamaConfig, Qwen3MoeConfig

from pangu import convert
from pangu.compress import Keys, Method

SMALL = {**SETTINGS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
MODELS = {
    "dense": LlamaConfig(**SMALL),
    "experts": Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
WEIGHTS, ACTIVATIONS, CACHE = (2, 3, 4, 5, 6, 7, 8, 16), (16, 8, 4), (8, 4, 3)
TABLE = re.compile(r"^(?:before|[A-Z0-9_]+ \w+) +[\d,]+ +(\S+)$", re.MULTILINE)


class Way(NamedTuple):
    model: str
    scheme: str
    method: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.model, self.scheme, self.method, *self.options])


class End(NamedTuple):
    """How a command ended: `said` is its perplexities or sentence, or the error that came out."""

    kind: str  # works, refused or fails
    said: str


def ways() -> Iterator[Way]:
    plain = ["MXFP4A16", *(f"W{w}A{a}" for w in WEIGHTS for a in ACTIVATIONS)]
    schemes = [name for one in plain for name in (one, f"{one}_ASYM")]
    for model in MODELS:
        for method in Method:
            for scheme in schemes:
                yield Way(model, scheme, method)
            for scheme in ("W8A8", "W4A4", "MXFP4A16", "W16A8"):
                yield Way(model, scheme, method, ("--rotate",))
            for bits in CACHE:
                for keys in Keys:
                    yield Way(model, f"W16A16KV{bits}", method, ("--keys", keys))
                    yield Way(model, f"W4A8KV{bits}", method, ("--keys", keys, "--rotate"))


def quantised(way: Way, folder: Path, out: Path) -> End:
    words = ["quantize", folder / "ours", "--scheme", way.scheme, "--method", way.method]
    words += ["--calibration", folder / "text", "--tokens", 64, "--window", 32, "--out", out]
    words += ["--group-size", 16, "--epochs", 1, *way.options]
    return ended(lambda: compress(words))


def exported(folder: Path, out: Path) -> End:
    words = ["export", str(folder), "--no-check", "--out", str(out)]
    return ended(lambda: convert.main(words))


def ended(command: Callable[[], int]) -> End:
    said, wrong = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            code = command()
    except Exception:
        return End("fails", traceback.format_exc().strip().splitlines()[-1])
    if code == 0:
        found = TABLE.findall(said.getvalue())
        sane = all(float(one.replace(",", "")) < float("inf") for one in found)
        return End("works" if sane else "fails", " -> ".join(found))
    lines = [line for line in wrong.getvalue().splitlines() if line.startswith("error: ")]
    return End("refused" if code == 2 and len(lines) == 1 else "fails", "; ".join(lines))


def tried(ways: Iterable[Way], folder: Path) -> Iterator[tuple[Way, End, End | None]]:
    """How each way ended, and the export of its result. `folder` is for models."""
    for name in dict.fromkeys(way.model for way in ways):
        (folder / name).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            saved(MODELS[name], folder / name)
    for way in ways:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            small, out = Path(work) / "small", Path(work) / "out"
            end, after = quantised(way, folder / way.model, small), None
            if end.kind == "works":
                after = exported(small, out)
            kept = {small: end.kind == "works", out: after is not None and after.kind == "works"}
            there = {path for path, right in kept.items() if right}
            for path in there:
                shutil.rmtree(path)
            if left := list(Path(work).iterdir()):
                end = End("fails", f"left {', '.join(path.name for path in left)}")
        yield way, end, after


def main(words: list[str]) -> int:
    chosen = [way for way in ways() if all(word in str(way).split() for word in words)]
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, end, after in tried(chosen, Path(folder)):
            print(f"{way!s:50}{end.kind:9}{end.said}", flush=True)
            if after is not None and after.kind != "works":
                print(f"{'':50}export {after.kind}: {after.said}", flush=True)
            for kind in [end.kind, *([] if after is None else [f"export {after.kind}"])]:
                counts[kind] = counts.get(kind, 0) + 1
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return int(any("fails" in kind for kind in counts) or not counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
