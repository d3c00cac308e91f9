"""DeepSpeed's state in files: `python -m tests.drills.nvme [FOLDER]`, on a drive's folder.

One process and two train a model, whose larger groups of weights are on the drive and smaller ones
in memory, for twenty steps, one of which meets a NaN: losses against megatron-core's engine, and
everything (losses, norms, weights, moments) against `engine.offload=cpu`, to the bit. Then a
checkpoint of megatron-core's engine is read into the files and written again, to the bit; and a run
goes on from one engine to the other and back. Exit code 1 if losses or norms differ by 1e-5 or
more, or files are left.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import gloo
import torch
from checkpoint_runs import train
from deepspeed_runs import Left, saved, steps, through

from pangu.engines.deepspeed import engine
from tests.drills.zero_stages import MOST, STEPS

# In two pieces the matrices, and the experts', are above the MiB from which DeepSpeed uses files.
SIZES = ["model.vocab_size=16384", "model.moe_ffn_hidden_size=512"]


def drive(folder: Path) -> list[str]:
    place = [f"engine.nvme_path={folder / 'drive'}", "engine.offload=nvme"]
    return [*SIZES, "engine=deepspeed", "parallel.zero_stage=3", *place]


def all_three(folder: Path, ranks: int) -> tuple[list[Left], list[int]]:
    """What was left with the drive, with the host's memory and by megatron-core's engine; and the
    bytes that this rank had on the drive, of weights and of state."""
    sizes: list[int] = []
    kept = engine._clear, engine.WeightsFile

    class Measured(engine.WeightsFile):  # type: ignore[misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            sizes.append(self.bytes)

    def measured(place: Path, rank: int) -> None:
        files = place.rglob(f"rank{rank}/*.swp")
        sizes.append(sum(file.stat().st_size for file in files))
        kept[0](place, rank)

    engine._clear, engine.WeightsFile = measured, Measured  # type: ignore[misc]
    try:
        left = [steps(drive(folder), ranks, count=STEPS)]
        gc.collect()
    finally:
        engine._clear, engine.WeightsFile = kept  # type: ignore[misc]
    host = [*SIZES, "engine=deepspeed", "parallel.zero_stage=3", "engine.offload=cpu"]
    left += [steps(overrides, ranks, count=STEPS) for overrides in (host, SIZES)]
    return left, sizes


def apart(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """The largest relative difference of the losses and norms of rows."""
    rows = list(zip(found, expected, strict=True))
    pairs = [(a[place], b[place]) for a, b in rows for place in (0, 1)]
    return max(abs(x - y) / abs(y) for x, y in pairs if x == x or y == y)


def checkpoints(folder: Path) -> tuple[Any, Any]:
    """A run at a stretch, and one whose third and fourth steps are DeepSpeed's; the last of the
    first through the drive."""
    kept = [*SIZES, "checkpoint.save_every=1", "checkpoint.keep_last=9"]
    straight, _ = train(folder / "straight", ["train.steps=6", *kept])
    first = folder / "straight/checkpoints/step_00000002"
    source = f"checkpoint.resume={first}"
    chain, _ = train(folder / "chain", ["train.steps=4", *kept, source, *drive(folder)])
    again = ["train.steps=6", *kept, "checkpoint.resume=auto"]
    chain, _ = train(folder / "chain", again)
    through(drive(folder), folder / "straight/checkpoints/step_00000006", folder / "through")
    return straight, chain


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory(dir=words[0] if words else None) as made:
        return run(Path(made))


def run(folder: Path) -> int:
    worst, wrong = 0.0, 0
    for ranks in (1, 2):
        for rank, (left, sizes) in enumerate(gloo.run(ranks, all_three, folder, ranks)):
            files, host, megatron = left
            assert files.skipped == megatron.skipped
            assert files.updates == megatron.updates == STEPS - 1
            far = apart(files.rows, megatron.rows)
            others = [n for n, t in host.tensors.items() if not torch.equal(files.tensors[n], t)]
            same = repr(files.rows) == repr(host.rows)  # of which one is not a number
            worst, wrong = max(worst, far), wrong + len(others) + (not same)
            print(f"{ranks} processes, rank {rank}: within {far:.1e} of megatron's; ", end="")
            print(
                f"{len(others)} of {len(host.tensors)} tensors, and {int(not same)} rows, differ "
            )
            print(
                f"    from those with engine.offload=cpu; MiB in files: weights "
                f"{sizes[0] / 2**20:.1f}, state {sizes[1] / 2**20:.1f}"
            )
    (straight, chain), _ = gloo.run(2, checkpoints, folder)
    far = apart(chain.values(), [straight[step] for step in chain])
    last = "checkpoints/step_00000006"
    before, after = saved(folder / "straight" / last), saved(folder / "through" / last)
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    kept = [file for file in (folder / "drive").rglob("*") if file.is_file()]
    print(f"steps {sorted(chain)} of a chain of engines: within {far:.1e}")
    print(f"{len(before)} tensors of a checkpoint through the drive: {len(differ)} differ")
    print(f"{len(kept)} files left on the drive")
    bad = wrong or differ or kept or before.keys() != after.keys()
    return int(bool(bad) or not max(worst, far) < MOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
