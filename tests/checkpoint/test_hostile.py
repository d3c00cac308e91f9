"""No byte of a checkpoint is executed, whoever wrote it."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import copy, train
from gloo import drop_groups, run
from hostile import HOSTILE, Hostile, reseal

from configs.violation import ConfigError


def resumed(run_dir: Path) -> str:
    """The step that a run goes on from, or what it says."""
    from pangu.report.run_files import METRICS

    before = (run_dir / METRICS).stat().st_mtime_ns
    try:
        train(run_dir, ["train.steps=5", "checkpoint.save_at_end=false"])
    except ConfigError as error:
        return str(error)
    assert (run_dir / METRICS).stat().st_mtime_ns != before
    aside = run_dir / "checkpoints" / "set_aside"
    return "from 2" if aside.is_dir() else "from 4"


def generated(folder: Path) -> str:
    """Which weights generation gets, or what it says."""
    from pangu.engines.megatron import process_groups
    from pangu.trained_model import load_for_inference, read_run_config

    try:
        config = read_run_config(folder)
        process_groups.initialize(config)
        load_for_inference(config, folder)
    except ConfigError as error:
        return str(error)
    finally:
        drop_groups()
    return "loaded"


def tried(folder: Path) -> dict[str, Any]:
    """For every hostile file: (code that ran, resumed, generated from the run, from the folder)."""
    train(folder / "run", ["train.steps=4", "checkpoint.save_every=2"])
    outcomes = {}
    for name, spoil in HOSTILE.items():
        marker = folder / "executed"
        run_dir = copy(folder / "run", folder / name.replace(" ", "_"))
        step = run_dir / "checkpoints" / "step_00000004"
        spoil(step, marker)
        reseal(step)
        texts = generated(run_dir), generated(step), resumed(run_dir)
        outcomes[name] = marker.exists(), *texts
    return outcomes


@pytest.mark.distributed
def test_nothing_of_a_hostile_checkpoint_is_executed(tmp_path, capfd):
    (outcomes,) = run(1, tried, tmp_path)
    assert {name for name, (executed, *_) in outcomes.items() if executed} == set()
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out

    # A spoilt newest checkpoint is named, and the one before it is used.
    for name in (".metadata", "inside .metadata", "a dtype", "a tensor"):
        _, from_run, from_step, on = outcomes[name]
        assert (from_run, on) == ("loaded", "from 2"), name
        assert "is no sound checkpoint" in from_step, name
    asked = "it asks for io.open, which a list of tensors has no use for"
    assert f"step_00000004 is damaged: .metadata is no list of tensors ({asked})" in said.err
    # Generation needs no random states.
    for name in ("random states", "bare random states"):
        assert outcomes[name][1:] == ("loaded", "loaded", "from 2"), name
    assert outcomes["common.pt"][1:] == ("loaded", "loaded", "from 4")
    missing = "embedding.word_embeddings.weight is missing"
    assert all(missing in text for text in outcomes["an object for a tensor"][1:])
    for name in ("tokenizer_info.json", "the tokenizer"):
        assert all("tokenizer" in text for text in outcomes[name][1:3]), outcomes[name]
    assert "cannot be read" in outcomes["config.yaml"][2]


def test_the_engine_asks_for_its_reader_where_ours_is_put():
    import gloo

    gloo.single()
    from megatron.core.dist_checkpointing.strategies import torch as engine

    from pangu.engines.megatron import safe_reader

    found = engine._get_filesystem_reader("nowhere", cache_metadata=True)
    assert isinstance(found, safe_reader.SafeReader)

    def elsewhere(self) -> None: ...

    strategy = type("", (), dict.fromkeys(("load", "load_tensors_metadata"), elsewhere))
    moved = type("", (), {"TorchDistLoadShardedStrategy": strategy, "_get": None})
    strategy.load_sharded_metadata = elsewhere
    with pytest.raises(LookupError, match="no longer uses _get"):
        safe_reader.replace_reader(moved, "_get")


def test_the_engine_itself_reads_nothing_but_through_it(tmp_path):
    """Its own entry points, which tools may call on a folder, meet the same reader."""
    import gloo

    gloo.single()
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    from pangu.checkpoint import contents
    from pangu.checkpoint.manifest import DamagedCheckpoint
    from pangu.engines.megatron.safe_reader import Unreadable

    save_config(CheckpointingConfig("torch_dist", 1), str(tmp_path))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    with pytest.raises(Unreadable, match=r"it asks for _?io\.open"):
        load_tensors_metadata(str(tmp_path))
    with pytest.raises(DamagedCheckpoint, match=r"it asks for _?io\.open"):
        contents.load_random_states(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_list_of_tensors_that_debian_12s_python_wrote_is_read(tmp_path):
    """Up to 3.11.3 a member of an enumeration was pickled as a call of `getattr`."""
    import copyreg

    import torch
    from torch.distributed.checkpoint import metadata, planner, save

    from pangu.engines.megatron.safe_reader import read_metadata, shapes

    save({"weight": torch.ones(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    file = tmp_path / ".metadata"
    tree = pickle.loads(file.read_bytes())
    tree.storage_meta = None  # a path, which the engine's writer leaves out
    with file.open("wb") as opened:
        pickler = pickle.Pickler(opened)
        pickler.dispatch_table = copyreg.dispatch_table | {
            kind: lambda member: (getattr, (type(member), member.name))
            for kind in (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)
        }
        pickler.dump(tree)
    assert b"getattr" in file.read_bytes()
    assert shapes(read_metadata(tmp_path)) == {"weight": (2, 3)}
