"""What a test does to checkpoints, and what runs then do; every function runs on all ranks."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_runs import MODEL, copy, train

from configs.compose import load
from configs.violation import ConfigError
from pangu.checkpoint import manifest


def damaged(folder: Path) -> dict[str, Any]:
    """For each kind of damage to the newest checkpoint (step 4), where the run then started."""
    train(folder / "run", ["train.steps=4", "checkpoint.save_every=2"])
    found: dict[str, Any] = {}
    for name, spoil in SPOIL.items():
        run_dir = copy(folder / "run", folder / name)
        if dist.get_rank() == 0:
            for target in (
                ["step_00000004"] if name != "all" else ["step_00000002", "step_00000004"]
            ):
                spoil(run_dir / "checkpoints" / target)
        dist.barrier()
        try:
            # Sees what was loaded by the steps taken after it.
            rows, _ = train(run_dir, ["train.steps=5"])
            aside = sorted(p.name[:13] for p in (run_dir / "checkpoints" / "set_aside").iterdir())
            found[name] = (aside, len(rows))
        except ConfigError as error:
            found[name] = str(error)
    return found


def _truncate(step: Path) -> None:
    file = step / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])


def _flip(step: Path) -> None:
    file = step / manifest.MANIFEST
    file.write_text(file.read_text().replace('"step": 4', '"step": 3'))


SPOIL = {
    "truncated": _truncate,
    "missing": lambda step: (step / "__0_0.distcp").unlink(),
    "manifest": _flip,
    "all": _truncate,
}


def refusals(folder: Path) -> dict[str, str]:
    """What a run says about a checkpoint that it cannot use."""
    source = folder / "run" / "checkpoints" / "step_00000004"
    cases: dict[str, list[str]] = {"shape": ["model.hidden_size=64", "moe.router_scale=false"]}
    for name, edit in EDIT.items():
        if dist.get_rank() == 0:
            shutil.copytree(source, folder / f"step_{name}")
            _edit(folder / f"step_{name}", edit)
        cases[name] = []
    dist.barrier()
    said = {}
    for name, overrides in cases.items():
        path = source if name == "shape" else folder / f"step_{name}"
        try:
            resume = [f"checkpoint.resume={path}", "train.steps=5"]
            train(folder / f"refused_{name}", [*resume, *overrides])
        except ConfigError as error:
            said[name] = str(error)
    function = ["moe.score_function=sigmoid", "model.norm_epsilon=1e-3"]
    resume = [f"checkpoint.resume={source}", "train.steps=5", *function]
    allow = "checkpoint.allow_changes=[moe.score_function,model.norm_epsilon]"
    try:
        train(folder / "refused_function", resume)
    except ConfigError as error:
        said["function"] = str(error)
    rows, _ = train(folder / "allowed", [*resume, allow])
    said["allowed"] = str(sorted(rows))
    said["shelf"] = str(sorted(p.name for p in folder.glob("refused_*")))
    return said


def from_another_run(folder: Path) -> tuple[list[int], str]:
    """Steps taken when the folder of another run is named, and what an unfinished one answers."""
    rows, _ = train(folder / "other", [f"checkpoint.resume={folder / 'run'}", "train.steps=5"])
    if dist.get_rank() == 0:
        (folder / "young" / "checkpoints").mkdir(parents=True)
    dist.barrier()
    try:
        train(folder / "other", [f"checkpoint.resume={folder / 'young'}"])
    except ConfigError as error:
        return sorted(rows), str(error)
    return sorted(rows), "started"


def _edit(step: Path, edit: Any) -> None:
    """Change the list of tensors, with the manifest made to agree."""
    file = step / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata.state_dict_metadata)
    file.write_bytes(pickle.dumps(metadata))
    read = manifest.read(step)
    read.files[".metadata"] = manifest.record(file)
    manifest.write(step, read)


MOMENT = "optimizer.exp_avg_sq.decoder.layers.1.mlp.experts.w1"


def _add(tensors: dict[str, Any]) -> None:
    tensors["decoder.layers.9.mlp.experts.w1"] = tensors[MOMENT]


EDIT = {"lost": lambda tensors: tensors.pop(MOMENT), "added": _add}


def poisoned(folder: Path) -> list[int]:
    """A run whose weights are spoilt after step 5: (steps, sequences, skips, rollbacks)."""
    import torch
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.training.resilience import StopSignal
    from pangu.training.run import build_trainer

    class Spoilt(StopSignal):
        """Asked before each step: the place to break something from outside."""

        def agreed(self) -> bool:
            if trainer.state.step == 5 and not trainer.state.rollbacks:
                with torch.no_grad():
                    next(trainer.engine.chunks[0].parameters()).fill_(float("nan"))
            return super().agreed()

    config = load(
        [
            *MODEL,
            "launch.processes=2",
            f"run_dir={folder}/poisoned",
            "train.steps=8",
            "train.max_skipped_steps=2",
            "checkpoint.save_every=2",
        ]
    )
    process_groups.initialize(config)
    trainer = build_trainer(config, Spoilt())
    assert trainer.train() == 0
    parallel_state.destroy_model_parallel()
    state = trainer.state
    return [state.step, state.consumed_sequences, state.skipped_steps, state.rollbacks]


def weights_alone(folder: Path) -> float:
    """Largest difference between trained weights and those loaded for generation, elsewhere."""
    from megatron.core import parallel_state

    from pangu.checkpoint.restore import load_model, read_config
    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model

    path = folder / "run" / "checkpoints" / "step_00000004"
    config = read_config(path)
    assert config.model.hidden_size == 32
    _, trained = train(copy(folder / "run", folder / "again"), ["train.steps=4"])
    process_groups.initialize(config)
    chunks, _ = build_model(config)
    load_model(path, chunks)
    parallel_state.destroy_model_parallel()
    loaded = dict(chunks[0].named_parameters())
    return max(
        (loaded[name.removeprefix("0.module.")] - weight).abs().max().item()
        for name, weight in trained.items()
    )


def held(folder: Path) -> tuple[int, int, int]:
    """Bytes that this rank gathers for a save, those of them that are held when the writing
    process is forked, and those that it writes."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from pangu.checkpoint import saver
    from pangu.engines.state_parts import Part

    gathered: list[tuple[StorageWeakRef, int]] = []
    found = []
    whole, begin = Part.whole, saver._Writing.__init__

    def remember(part, name):
        tensor = whole(part, name)
        gathered.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        return tensor

    def look(self, manifest, path, plan):
        kept = sum(size for storage, size in gathered if not storage.expired())
        buckets = plan.writer.write_buckets
        written = sum(tensor.nbytes for *_, (_, some) in buckets for _, tensor in some)
        found.append((sum(size for _, size in gathered), kept, written))
        begin(self, manifest, path, plan)

    Part.whole, saver._Writing.__init__ = remember, look
    try:
        train(folder / "held", ["train.steps=1", "parallel.zero_stage=1"])
    finally:
        Part.whole, saver._Writing.__init__ = whole, begin
    return found[0]


def everything(folder: Path) -> dict[str, Any]:
    """All of the above in one set of processes."""
    return {
        "damaged": damaged(folder),
        "refusals": refusals(folder),
        "other run": from_another_run(folder),
        "poisoned": poisoned(folder),
        "weights": weights_alone(folder),
        "held": held(folder),
    }
