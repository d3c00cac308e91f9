"""Odd configurations: seeded and bounded, for whoever must refuse or accept them in a sentence.

`python -m tests.configs.odd [600]` asks trainer and doctor about so many in this process and prints
a table of outcomes; the default tests ask about fewer.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from unittest import mock

from configs import groups
from configs.change_rules import leaves
from configs.compose import load
from launch.environment import STARTED_BY
from pangu import doctor, preflight, train

SECONDS = 20  # of CPU time that one verdict may take before it counts as a hang
NUMBERS = ["nan", "inf", "-inf", "1e300", "-1", "0", "1", "2", "3", "7", "0.5", "1e-300", "-1e300"]
NUMBERS += ["1000000", "1000000000", "1" + "0" * 23, "9" * 400, "9" * 5000, "1_000", "0x10", "1e5"]
WORDS = ["null", "true", "[]", "{}", "[1,2]", "{a: 1}", "''", "' '", "words", "ü", "${seed}", "$x"]
WORDS += ["${train.steps}", "${no.such}", "[[[[1]]]]", "[" * 200, "a" * 5000, "1,2", "range(3)"]
WORDS += ["../..", "/proc/nothing", "/dev/null", "a/" * 200, "%s", "\\", '"', "=", "a=b", "*", "&a"]
LINES = ["", "=", "=1", "train", "train.", ".steps=1", "train..steps=1", "~train", "~train.steps"]
LINES += [
    "+train.steps=1",
    "++train.steps=x",
    "train=x",
    "train@x=1",
    "hydra.job.name=x",
    "a.b.c=1",
]
LINES += ["hydra=x", "defaults=[]", "model=[]", "-", "experiment=", "hardware=.yaml", "model/x=y"]
FILES: dict[str, bytes] = {
    "list": b"- 1\n- 2\n",
    "number": b"3\n",
    "text": b"just words\n",
    "empty": b"",
    "null": b"null\n",
    "itself": b"train: &a\n  steps: *a\n",
    "laughs": b"a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    "binary": bytes(range(256)) * 8,
    "zeros": b"\0" * 100,
    "latin": "run_dir: fa\u00e7ade\n".encode("latin-1"),
    "huge": b"train: {steps: 1}\n" + b"# padding\n" * 200_000,
    "deep": b"a: " + b"[" * 5000 + b"]" * 5000,
    "indented": b"".join(b" " * i + b"a:\n" for i in range(300)),
    "unclosed": b"train: {steps: 1\n",
    "twice": b"train: {steps: 1}\ntrain: {steps: 2}\n",
    "code": b"run_dir: !!python/object/apply:os.system ['touch ran']\n",
    "date": b"run_dir: 2024-01-01\n",
    "unhashable": b"? [1, 2]\n: 3\n",
    "number key": b"1: 2\n",
    "nested wrong": b"train: 5\nmodel: [1]\n",
    "unknown": b"colour: red\ntrain: {stepps: 3}\n",
    "not finite": b"optimizer: {lr: .nan}\nmemory_gib: .inf\n",
    "defaults": b"defaults: 5\ntrain: {steps: 1}\n",
    "default words": b"defaults: [words]\ntrain: {steps: 1}\n",
    "default option": b"defaults: [{override /model: no_such}]\ntrain: {steps: 1}\n",
    "interpolated": b"run_dir: ${no.such}\n",
    "escaped": b'run_dir: "a\\nb\\"c\\\\"\n',
    "fine": b"train: {steps: 3}\n",
}


@dataclass(frozen=True)
class Verdict:
    """Exit code of a command, or how it failed: a traceback, or None of both for a hang."""

    code: int | None
    said: str = ""
    traceback: str = ""


class _Hang(BaseException):
    """Out of CPU time; no `except Exception` may catch it."""


def generate(count: int, folder: Path, seed: int = 0) -> Iterator[list[str]]:
    """Lists of arguments; `folder` gets the files that they name."""
    draw = random.Random(seed)
    keys = [key for key, _ in leaves(load([]))]
    files = _write(folder)
    fixed = [[line] for line in LINES]
    fixed += [[f"{key}={path}"] for path in files for key in ("experiment", "hardware")]
    kinds: list[Callable[[], list[str]]] = [
        lambda: [f"{draw.choice(keys)}={draw.choice(NUMBERS)}"],
        lambda: [f"{draw.choice(keys)}={draw.choice(WORDS)}"],
        lambda: [f"{draw.choice(list(groups()))}={draw.choice(WORDS)}"],
        lambda: [f"{draw.choice(keys)}={draw.choice(NUMBERS)}" for _ in range(4)],
        lambda: _machine(draw),
        lambda: _layout(draw),
        lambda: _layout(draw),
        lambda: _presets(draw),
        lambda: _size(draw),
    ]
    draw.shuffle(fixed)
    for number in range(count):
        # A quarter are those that are always asked about, as far as they go.
        if number % 4 == 0 and fixed:
            yield fixed.pop()
        else:
            yield draw.choice(kinds)()


def _write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / f"{name}.yaml").write_bytes(content)
    (folder / "a folder.yaml").mkdir(exist_ok=True)
    named = [f"{name}.yaml" for name in FILES]
    again = folder / "experiment again.yaml"
    again.write_text(f"defaults: [{{override /experiment: '{again}'}}]\ntrain: {{steps: 1}}\n")
    return [folder / name for name in [*named, "a folder.yaml", "none.yaml", again.name]]


def _machine(draw: random.Random) -> list[str]:
    figures = ["memory_gib", "memory_efficiency", "links", "links.0.devices", "matmul.tiles"]
    figures += ["overlap.exchange", "peak_tflops", "devices_per_node", "name", "evidence", "colour"]
    value = draw.choice(NUMBERS + WORDS)
    return [
        f"hardware={draw.choice(groups()['hardware'])}",
        f"hardware.{draw.choice(figures)}={value}",
    ]


def _layout(draw: random.Random) -> list[str]:
    names = ["tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"]
    lines = [f"parallel.{n}_parallel_size={draw.choice([1, 1, 2, 3, 4, 8])}" for n in names]
    lines += [f"launch.processes={draw.choice([1, 2, 4, 8, 64, 1000000])}"]
    lines += [f"train.global_batch_size={draw.choice([1, 6, 8, 64])}"]
    if draw.random() < 0.3:
        lines += [f"devices={draw.choice([1, 2, 8, 64, 4096, 10**6, 10**9])}"]
    if draw.random() < 0.3:
        lines += [f"launch.nodes={draw.choice([1, 2, 1000, 10**7])}"]
    if draw.random() < 0.3:
        lines += [f"parallel.pipeline_layout={draw.choice(['[2,2]', '[4,0]', '[-1,5]', '[]'])}"]
    if draw.random() < 0.3:
        lines += [f"parallel.virtual_pipeline_model_parallel_size={draw.choice([2, 3, 10**9])}"]
    return lines


def _presets(draw: random.Random) -> list[str]:
    chosen = draw.sample(sorted(set(groups()) - {"experiment", "debug", "data"}), 3)
    return [f"{group}={draw.choice(groups()[group])}" for group in chosen]


def _size(draw: random.Random) -> list[str]:
    big = ["1024", "65536", "1000000", "2000000000"]
    keys = ["hidden_size", "ffn_hidden_size", "vocab_size", "num_layers", "moe_ffn_hidden_size"]
    keys += ["num_experts", "max_position_embeddings"]
    lines = [f"model.{key}={draw.choice(big)}" for key in draw.sample(keys, 2)]
    return [*lines, f"train.seq_length={draw.choice(big)}", f"train.steps={draw.choice(big)}"]


def trainer(arguments: Sequence[str]) -> Verdict:
    """What `pangu.train` says, up to where it would start; under a launcher that has started all
    processes, on a machine with room, where the arguments plan for other processes than here."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", STARTED_BY)}
    with contextlib.ExitStack() as stack:
        if world := _planned(arguments):
            environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
            environ |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
            room = mock.patch("pangu.machine_check.memory_bytes", return_value=2**60)
            stack.enter_context(room)
        stack.enter_context(mock.patch.dict(os.environ, environ, clear=True))
        stack.enter_context(mock.patch.object(train, "_start", return_value=0))
        return _verdict(train.main, arguments)


def asked(arguments: Sequence[str]) -> Verdict:
    """What `pangu.doctor` says."""
    return _verdict(doctor.main, arguments)


def _planned(arguments: Sequence[str]) -> int:
    """How many processes a launcher starts for a cluster; 0 for this machine."""
    if any(line.startswith("-") for line in arguments):
        return 0
    from configs.check import examine

    try:
        config, _ = examine(list(arguments))
    except Exception:  # the verdict shows it
        return 0
    if config is None or not preflight.plans_a_cluster(config):
        return 0
    config = replace(config, devices=config.devices)
    return config.world_size if 0 < config.world_size < 2**40 else 0


def _verdict(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Verdict:
    out = io.StringIO()

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return Verdict(main(arguments), out.getvalue())
    except _Hang:
        return Verdict(None, traceback=traceback.format_exc())
    except BaseException:
        return Verdict(1, out.getvalue(), traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcome(arguments: Sequence[str]) -> tuple[str, Verdict, Verdict]:
    """How both commands took the arguments, in a word."""
    first, second = trainer(arguments), asked(arguments)
    for verdict, who in ((first, "trainer"), (second, "doctor")):
        if verdict.code is None:
            return f"hang of the {who}", first, second
        if verdict.traceback:
            return f"traceback of the {who}", first, second
    if first.code != second.code:
        return f"trainer {first.code}, doctor {second.code}", first, second
    return "both refuse" if first.code else "both accept", first, second


def main(count: int) -> int:
    """Print every wrong outcome and a table; 1 when there was one."""
    table: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for arguments in generate(count, Path(folder) / "files"):
            word, first, second = outcome(arguments)
            table[word] += 1
            if not word.startswith("both"):
                print(word, [line[:200] for line in arguments])
                print((first.traceback or second.traceback or first.said + second.said)[-1500:])
    print(f"{count} configurations:")
    for word, number in table.most_common():
        print(f"{number:6} {word}")
    return int(any(not word.startswith("both") for word in table))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 600))
