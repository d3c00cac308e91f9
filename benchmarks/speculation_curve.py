"""What drafts gain on a small MoE of ours, batch 1 to 64, beside what the simulator says of it.

    python -m benchmarks.speculation_curve [--work DIR] [--steps 250] [--seconds 4]

It trains a target of 54 million parameters (64 experts, 8 a token) and a dense draft on Python's
standard library, calibrates the machine, times plain and speculative decoding, greedy, and prints
the speed-ups beside `simulator speculate`: (i) of the calibrated machine, (ii) of MoESD's ten
parameters fitted to a third of the points. The simulator is told σ, as measured, and how popular
experts are. What DIR has already is not made again. One thread; times are processor seconds of
steps in which every sequence decodes, medians; wall time beside.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 3, 4, 6)  # of drafts
PROMPT, NEW = 32, 64  # tokens
TURN = 0.5  # seconds that one number of guesses decodes before the next has its turn
COUNTED = 4  # rounds of each kind that count experts
TARGET = {
    "num_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "moe_ffn_hidden_size": 128,
    "tie_embeddings": True,
}
DRAFT = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "ffn_hidden_size": 512,
    "tie_embeddings": True,
}
ROUTER = {"router": "top_k", "top_k": 8, "aux_loss_coefficient": 1e-2, "renormalize": True}
TRAINING = [
    "data=stdlib",
    "backend=cpu",
    "backend.threads=1",
    "train.micro_batch_size=8",
    "train.global_batch_size=8",
    "train.seq_length=128",
    "train.validate_every=0",
    "optimizer.warmup_steps=20",
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--work", type=Path, default=Path("runs/speculation_curve"))
    options.add_argument("--steps", type=int, default=250, help="of training the target")
    options.add_argument("--seconds", type=float, default=4.0, help="for each point")
    given = options.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    models = {name: described(given.work, name) for name in ("target", "draft")}
    trained(given.work, models, given.steps)
    machine = calibrated(given.work)
    points, popularity = measured(given.work, given.seconds)
    write_points(given.work, points, popularity)
    for measured_experts in (False, True):
        told = "the experts that passes touched" if measured_experts else "how popular experts are"
        print(f"\nthe simulator is told {told}")
        said = forecast(given.work, models, machine, measured_experts=measured_experts)
        report(given.work, points, said)


def described(work: Path, name: str) -> Path:
    """A model as the trainer and the simulator take it."""
    tree: dict = {"model": {"name": name, **(TARGET if name == "target" else DRAFT)}}
    if name == "target":
        tree["moe"] = ROUTER
    file = work / f"{name}.yaml"
    file.write_text(json.dumps(tree, indent=1) + "\n")
    return file


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def trained(work: Path, models: dict[str, Path], steps: int) -> None:
    """Both, on the same text; the draft for three times as many steps, which it takes less for."""
    for name, count, rate in (("target", steps, 1.5e-3), ("draft", 3 * steps, 4e-3)):
        if (work / name / "done").exists():
            continue
        own = [f"experiment={models[name]}", f"run_dir={work / name}", f"train.steps={count}"]
        run("pangu.train", *TRAINING, *own, f"optimizer.lr={rate}")
        (work / name / "done").touch()


def calibrated(work: Path) -> Path:
    file = work / "machine.yaml"
    if not file.exists():
        own = ["--out", str(file), "--processes", "1", "backend=cpu", "backend.threads=1"]
        run("pangu.calibrate", *own)
    return file


@dataclass
class Point:
    """Steps of one batch and number of guesses: processor and wall seconds, tokens; experts touched
    in a layer by a step; what the engine measured of its parts, processor seconds."""

    batch: int
    guesses: int
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    tokens: int = 0
    experts: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """Tokens of a sequence in a step."""
        return self.tokens / len(self.seconds) / self.batch

    @property
    def sigma(self) -> float:
        return self.length / (self.guesses + 1)

    def rate(self, wall: bool = False) -> float:
        """Tokens a second of all sequences."""
        return self.length * self.batch / statistics.median(self.wall if wall else self.seconds)


Points = dict[tuple[int, int], Point]


def measured(work: Path, seconds: float) -> tuple[Points, np.ndarray]:
    """Every batch and number of guesses, 0 among them, in turns; and how often each expert of each
    layer was chosen."""
    from pangu.data.stdlib import standard_library_folder
    from pangu.trained_model import load_for_inference, loaded, read_run_config

    found: Points = {}
    with loaded(work / "target", "cpu") as (target, tokenizer, config):
        draft, _ = load_for_inference(read_run_config(work / "draft"), work / "draft")
        torch.set_num_threads(1)
        corpus = standard_library_folder(config.data.cache_dir, config.model.vocab_size)
        models = Models(target, draft, tokenizer.vocab_size, texts(corpus / "validation.bin"))
        clock = SimpleNamespace(perf_counter=time.process_time)
        with mock.patch("pangu.inference.engine.time", clock):
            for batch in BATCHES:
                found |= of_batch(models, batch, max(1, round(seconds / TURN)))
        popularity = counted(models, found)
    return found, popularity


def of_batch(models: Models, batch: int, turns: int) -> Points:
    """Plain decoding and all numbers of guesses, in turns."""
    points = {guesses: Point(batch, guesses) for guesses in (0, *LENGTHS)}
    running = {guesses: Decoding(models, batch, guesses) for guesses in points}
    for _ in range(turns):
        for guesses, each in running.items():
            each.into(points[guesses])
    for guesses, point in points.items():
        sums = running[guesses].rounds
        point.parts = {
            "T_T": sums.verify / sums.count,
            "T_D": sums.draft / sums.count / max(1, guesses),
            "T_reject": sums.reject / sums.count,
        }
    print(f"batch {batch}: {[len(point.seconds) for point in points.values()]} steps", flush=True)
    return {(batch, guesses): point for guesses, point in points.items()}


def texts(file: Path) -> list[tuple[int, ...]]:
    """Beginnings of pieces of a corpus."""
    tokens = np.fromfile(file, dtype=np.uint16)
    starts = np.random.default_rng(0).integers(0, len(tokens) - PROMPT, 256)
    return [tuple(tokens[start : start + PROMPT].tolist()) for start in starts]


@dataclass
class Models:
    """The target, its draft, and what they are asked."""

    target: Any
    draft: Any
    vocab_size: int
    prompts: list[tuple[int, ...]]

    def engine(self, batch: int, guesses: int):
        from pangu.inference.engine import Engine
        from pangu.inference.speculative import ModelDrafter

        engine = Engine(
            self.target,
            vocab_size=self.vocab_size,
            cache_tokens=batch * (PROMPT + NEW + 32),
            max_sequences=batch,
            max_batch_tokens=1024,
            prefix_reuse=False,
        )
        if guesses:
            engine.drafter = ModelDrafter(self.draft, engine.scheduler, self.vocab_size)
            engine.draft_tokens = guesses
        return engine


class Decoding:
    """An engine whose `batch` sequences have all begun to decode, and others wait behind them."""

    def __init__(self, models: Models, batch: int, guesses: int) -> None:
        self.batch, self.guesses = batch, guesses
        self._prompts = itertools.cycle(models.prompts)
        self.engine = models.engine(batch, guesses)
        for _ in range(3):
            self.step()
        self.engine.counts.measured.rounds.clear()

    @property
    def rounds(self):
        """What the engine has measured of full rounds."""
        return self.engine.counts.measured.round_of(self.batch, self.guesses)

    def step(self) -> None:
        """As the engine's."""
        from pangu.inference.batching import Request
        from pangu.inference.sampling import Sampling

        while len(self.engine.scheduler.waiting) < self.batch:
            self.engine.add(Request(next(self._prompts), NEW, Sampling(temperature=0)))
        self.engine.step()

    def into(self, point: Point) -> None:
        """For a turn. Steps that read prompts, or make fewer guesses at a text's end, do not
        count."""
        begun = time.process_time()
        while time.process_time() - begun < TURN:
            count, tokens = self.rounds.count, self.rounds.tokens
            wall, own = time.perf_counter(), time.process_time()
            self.step()
            own, wall = time.process_time() - own, time.perf_counter() - wall
            if self.rounds.count > count:
                point.seconds.append(own)
                point.wall.append(wall)
                point.tokens += self.rounds.tokens - tokens


def counted(models: Models, found: Points) -> np.ndarray:
    """Experts touched, once all is timed; and choices `[layers, experts]` of plain decoding."""
    from pangu.inference.touched_experts import TouchedExperts
    from pangu.moe.router import ExpertRouter

    touched = TouchedExperts(models.target)
    for point in found.values():
        decoding = Decoding(models, point.batch, point.guesses)
        decoding.engine.touched_experts = touched
        while decoding.rounds.expert_rounds < COUNTED:
            decoding.step()
        point.experts = decoding.rounds.experts / decoding.rounds.expert_rounds
    routers = [each for each in models.target.modules() if isinstance(each, ExpertRouter)]
    chosen = torch.zeros(len(routers), TARGET["num_experts"])
    layers = {router: layer for layer, router in enumerate(routers)}

    def saw(router: torch.nn.Module, given: Any, out: Any) -> None:
        chosen[layers[router]] += out[1].sum(dim=0)

    decoding = Decoding(models, 32, 0)
    hooks = [router.register_forward_hook(saw) for router in routers]
    for _ in range(2 * NEW):
        decoding.step()
    for hook in hooks:
        hook.remove()
    return chosen.numpy()


def write_points(work: Path, points: Points, popularity: np.ndarray) -> None:
    """As `simulator speculate` reads them: every third point is to be fitted to."""
    counts = {str(layer): row.tolist() for layer, row in enumerate(popularity)}
    (work / "expert_load.json").write_text(json.dumps({"counts": counts}))
    rounds = [
        {"sequences": point.batch, "guesses": point.guesses, "experts": point.experts}
        for point in points.values()
    ]
    (work / "measured.json").write_text(json.dumps({"rounds": rounds}))
    (work / "points.pickle").write_bytes(pickle.dumps(points))
    rows = [
        (batch, guesses, ROUTER["top_k"], point.sigma, speedup(points, batch, guesses))
        for guesses in LENGTHS
        for batch, point in ((b, points[b, guesses]) for b in BATCHES)
    ]
    with (work / "points.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["batch", "draft_tokens", "top_k", "sigma", "speedup", "fit"])
        out.writerows((*row, int(place % 3 == 0)) for place, row in enumerate(rows))


def speedup(points: Points, batch: int, guesses: int, wall: bool = False) -> float:
    return points[batch, guesses].rate(wall) / points[batch, 0].rate(wall)


def forecast(
    work: Path, models: dict[str, Path], machine: Path, *, measured_experts: bool
) -> dict[str, Any]:
    """What the simulator prints, told the experts that passes touched or how popular each is."""
    words = ["speculate", f"experiment={models['target']}", f"hardware={machine}", "devices=1"]
    words += [f"inference.draft={models['draft']}", f"inference.prompt_length={PROMPT}"]
    words += [f"inference.max_new_tokens={NEW}", f"--popularity={work / 'expert_load.json'}"]
    words += [f"--touched={work / 'measured.json'}"] if measured_experts else []
    words += [f"--batch={','.join(map(str, BATCHES))}", f"--fit={work / 'points.csv'}"]
    words += [f"--draft-tokens={','.join(map(str, LENGTHS))}", "--json"]
    return json.loads(run("simulator", *words))


def report(work: Path, points: Points, said: dict) -> None:
    """The table, errors, peaks, and the plot."""
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(
        "| γ | batch | T_T(B,1) ms | T_T(B,γ) | T_D | T_reject | forecast | N(t) | forecast | σ | "
        "speed-up | wall | roofline | error | fitted | error |"
    )
    print("|" + "---|" * 16)
    lines: dict[int, list[tuple[int, float, float, float]]] = {}
    used = {(int(row["batch"]), int(row["draft_tokens"])) for row in fitted_to(work)}
    for curve in said["curves"]:
        guesses = curve["draft_tokens"]
        for row in curve["rows"]:
            line = compare(points, row, guesses, (row["batch"], guesses) in used)
            lines.setdefault(guesses, []).append(line)
    rows = [(guesses, *line) for guesses, group in lines.items() for line in group]
    errors = [abs(roofline / real - 1) for _, _, real, roofline, _ in rows]
    print(f"roofline: mean error {np.mean(errors):.1%}, largest {max(errors):.1%}")
    others = [
        abs(fitted / real - 1) for guesses, b, real, _, fitted in rows if (b, guesses) not in used
    ]
    print(
        f"fitted to {len(used)} points: mean error of the other {len(others)} "
        f"{np.mean(others):.1%}, largest {max(others):.1%}"
    )
    for guesses, group in lines.items():
        peaks = [max(group, key=lambda line, at=at: line[at])[0] for at in (1, 2, 3)]
        print(f"γ = {guesses}: peak at batch {peaks[0]}, roofline {peaks[1]}, fitted {peaks[2]}")
    draw(work / "speculation_curve.png", lines)


def fitted_to(work: Path) -> list[dict[str, str]]:
    with (work / "points.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["fit"] == "1"]


def compare(points: Points, row: dict, guesses: int, used: bool) -> tuple:
    """Prints a line; batch, and the speed-up measured, of the roofline, and fitted, all for the σ
    that was measured."""
    batch = row["batch"]
    point, plain = points[batch, guesses], points[batch, 0]
    real = speedup(points, batch, guesses)
    scale = point.sigma / row["sigma"]
    roofline, fitted = scale * row["speedup"], scale * row["fitted_speedup"]
    parts, plain_ms = point.parts, 1e3 * plain.parts["T_T"]
    measured = " | ".join(f"{1e3 * parts[name]:.2f}" for name in ("T_T", "T_D", "T_reject"))
    names = ("plain_ms", "verify_ms", "draft_ms", "rejection_ms")
    expected = ", ".join(f"{row[name]:.2f}" for name in names)
    print(
        f"| {guesses} | {batch} | {plain_ms:.2f} | {measured} | {expected} | {point.experts:.1f} | "
        f"{row['active_experts']:.1f} | {point.sigma:.3f} | {real:.2f} | "
        f"{speedup(points, batch, guesses, wall=True):.2f} | {roofline:.2f} | "
        f"{roofline / real - 1:+.0%} | {fitted:.2f} | "
        f"{'' if used else f'{fitted / real - 1:+.0%}'} |"
    )
    return batch, real, roofline, fitted


def draw(path: Path, lines: dict[int, list]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(lines), figsize=(3.4 * len(lines), 3.6), sharey=True)
    for axes, (guesses, group) in zip(panels, lines.items(), strict=True):
        batch, real, roofline, fitted = zip(*group, strict=True)
        axes.plot(batch, real, "ko", label="measured")
        axes.plot(batch, roofline, "-", color="tab:blue", label="calibrated machine")
        axes.plot(batch, fitted, "--", color="tab:orange", label="MoESD's fit")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batch, [str(each) for each in batch])
        axes.set_title(f"{guesses} guess{'es' if guesses > 1 else ''}")
        axes.set_xlabel("sequences")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("speed-up over plain decoding")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
