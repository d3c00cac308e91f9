"""What a checkpoint holds, as megatron-core's sharded tensors, and the account of every load.

Weights are saved as the optimizer's main copy (float32 even where the model computes in bfloat16)
under the model's own names, AdamW's moments as `optimizer.<moment>.<name of the weight>`: any
layout and either precision can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.tensor_parallel import random
from torch.distributed.checkpoint.api import CheckpointException

from pangu.checkpoint import model_files
from pangu.checkpoint.manifest import DamagedCheckpoint
from pangu.checkpoint.tensor_files import Rows, Safetensors, WeightsError
from pangu.engines.megatron import safe_reader
from pangu.engines.ranks import from_rank_0
from pangu.engines.state_parts import MAIN, MOMENTS, Part

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
_Shapes: TypeAlias = dict[str, tuple[int, ...]]  # of whole tensors, by name
_Put: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]  # into a weight, of a whole tensor
OPTIMIZER_PREFIX = "optimizer."
_RANDOM = "random_state"
# Layers under their own names, not stacked: dense and MoE layers differ, and so do messages.
_METADATA = {"non_homogeneous_layers": True}
_LEAP = "leap_heads."
_BEGUN = (".lora_", ".input_rounding.")  # what does nothing to a model that has been saved without
_HEADS = ("output_layer.weight", "embedding.word_embeddings.weight")  # the latter where tied


class CheckpointMismatch(Exception):
    """A checkpoint that does not hold exactly what the run needs; names what is missing or
    extra."""


def model_entries(chunks: Sequence[Any]) -> dict[str, Sharded]:
    """Every weight and buffer of this rank; `data` is the tensor itself."""
    entries: dict[str, Sharded] = {}
    for i, chunk in enumerate(chunks):
        model = getattr(chunk, "module", chunk)
        for name, entry in model.sharded_state_dict(metadata=dict(_METADATA)).items():
            # Extra states are empty here: only FP8 layers would fill them.
            if not isinstance(entry, ShardedObject):
                entries[f"{i}.{name}"] = entry
    return entries


def to_save(chunks: Sequence[Any], everything: list[Part]) -> dict[str, Any]:
    """The whole state dict. Collective: distributed optimizer states are gathered."""
    by_parameter = {part.parameter: part for part in everything}
    entries = model_entries(chunks)
    _check_every_parameter_has_a_part(chunks, by_parameter)
    state: dict[str, Any] = {}
    for name, entry in entries.items():
        part = by_parameter.get(entry.data)
        state[name] = entry if part is None else _with_data(entry, part.whole(MAIN), "")
    for moment in MOMENTS:
        for name, entry in entries.items():
            if entry.data in by_parameter:
                whole = by_parameter[entry.data].whole(moment)
                prefix = f"{OPTIMIZER_PREFIX}{moment}."
                state[prefix + name] = _with_data(entry, whole, prefix)
    state[_RANDOM] = _random_state_entry(_random_states())
    return state


def load(
    path: Path, chunks: Sequence[Any], everything: list[Part] | None, *, moments: bool = True
) -> None:
    """Fill weights and, unless `everything` is None, main copies and, if wanted, `moments`. Leap
    heads of which the checkpoint has none begin as copies of the model's own, adapters and
    transforms of inputs as they are.

    One kind of tensor at a time: whole copies in main memory are as large as this rank's model
    in float32.

    Raises:
        CheckpointMismatch: before anything is changed.
        DamagedCheckpoint: on every rank, when a file cannot be read although it is as its manifest
            says; part of the tensors may be changed.
    """
    entries = model_entries(chunks)
    by_parameter = {part.parameter: part for part in everything or []}
    wanted: dict[str, dict[str, Sharded]] = {}
    if everything is not None:
        _check_every_parameter_has_a_part(chunks, by_parameter)
        trained = {n: e for n, e in entries.items() if e.data in by_parameter}
        # A model without a training run behind it: AdamW starts from zero moments.
        moments = moments and not model_files.holds_model(path)
        wanted = dict.fromkeys(MOMENTS, trained) if moments else {}
    begun: dict[str, Sharded] = {}
    saved = from_rank_0(lambda: _saved_shapes(path))
    if not any(key.startswith(_LEAP) for key in saved):
        begun = {name: entry for name, entry in entries.items() if _is_leap_head(entry)}
        entries = {name: entry for name, entry in entries.items() if name not in begun}
    for part in _BEGUN:
        if not any(part in key for key in saved):
            entries = {name: entry for name, entry in entries.items() if part not in entry.key}
    account(path, saved, entries, wanted, weights_only=everything is None or not moments)

    def put_weight(target: torch.Tensor, whole: torch.Tensor) -> None:
        with torch.no_grad():
            target.copy_(whole)
        if target in by_parameter:
            by_parameter[target].put(MAIN, whole)  # type: ignore[index]

    _load_into(path, entries, "", put_weight)
    _copy_head(path, saved, begun, put_weight)
    for moment, trained in wanted.items():

        def put_moment(target: torch.Tensor, whole: torch.Tensor, moment: str = moment) -> None:
            by_parameter[target].put(moment, whole)  # type: ignore[index]

        _load_into(path, trained, f"{OPTIMIZER_PREFIX}{moment}.", put_moment)


def load_rows(
    rows: Rows, chunks: Sequence[Any], wanted: Callable[[str], bool] = lambda _: True
) -> None:
    """Fill the weights whose names are `wanted`, in one process; no byte of others is read.

    Raises:
        WeightsError: before anything is changed, where the model and its files have other names or
            these weights other shapes; or a file is damaged.
    """
    entries = model_entries(chunks)
    needed = _shapes(entries, "")
    saved = {name: rows.shape(name) for name in rows.names()}
    wrong = sorted(needed.keys() ^ saved.keys()) or [
        name for name in needed if wanted(name) and needed[name] != saved[name]
    ]
    if wrong:
        raise WeightsError(f"{rows.folder} does not fit this model: see {', '.join(wrong[:5])}")
    chosen = {name: e for name, e in entries.items() if wanted(next(_tensors(e)).key)}
    for name, whole in model_files.read(rows, chosen):
        with torch.no_grad():
            entries[name].data.copy_(whole)


def _is_leap_head(entry: Sharded) -> bool:
    return bool(entry.key.startswith(_LEAP))


def _copy_head(path: Path, saved: _Shapes, entries: dict[str, Sharded], put: _Put) -> None:
    """Fill the outputs of leap heads with the model's own head. Collective."""
    outputs = [e for e in entries.values() if e.key.endswith(".output_layer.weight")]
    here: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(here, bool(outputs))
    if not any(here):
        return
    head = next(key for key in _HEADS if key in saved)

    def put_all(target: torch.Tensor, whole: torch.Tensor) -> None:
        for entry in outputs:
            put(entry.data, whole)

    # Read once for all of them: no element may be asked for twice.
    wanted = {"head": replace(outputs[0], key=head)} if outputs else {}
    _load_into(path, wanted, "", put_all)


def load_random_states(path: Path) -> None:
    """Random states of this rank; the layout must be the one that wrote them. Collective.

    Raises:
        DamagedCheckpoint: on every rank, when one cannot read its own.
    """
    if model_files.holds_model(path):
        return
    mine: dict[str, Any] = {}
    wrong = ""
    try:
        mine = _of_the_right_kind(
            safe_reader.read_object(path, _random_state_entry(None).unique_key)
        )
    except (safe_reader.Unreadable, DamagedCheckpoint) as error:
        wrong = str(error)
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong)
    if any(everywhere):
        raise DamagedCheckpoint(next(filter(None, everywhere)))
    _set_random_states(mine)


def _of_the_right_kind(loaded: Any) -> dict[str, Any]:
    """The states of one rank, if every one is as long as the one that it replaces."""
    present = _random_states()
    try:
        (states,) = loaded
        pairs = [
            (states["torch"], present["torch"]),
            (states["device"], present["device"]),
            *((states["engine"][name], present["engine"][name]) for name in present["engine"]),
        ]
        if all(_alike(*pair) for pair in pairs) and len(states["engine"]) == len(pairs) - 2:
            return states
    except (TypeError, ValueError, KeyError):
        pass
    raise DamagedCheckpoint("the random states are none")


def _alike(saved: Any, present: torch.Tensor) -> bool:
    return (
        isinstance(saved, torch.Tensor)
        and saved.dtype == present.dtype
        and saved.shape == present.shape
    )


def account(
    path: Path,
    saved: _Shapes,
    entries: dict[str, Sharded],
    moments: dict[str, dict[str, Sharded]],
    *,
    weights_only: bool,
) -> None:
    """Compare, over all ranks, what is needed with what the checkpoint holds, `saved`.

    Raises:
        CheckpointMismatch: on every rank, naming all that is missing, extra or of another shape.
    """
    needed = _shapes(entries, "")
    for moment, trained in moments.items():
        needed |= _shapes(trained, f"{OPTIMIZER_PREFIX}{moment}.")
    everywhere: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, needed)
    for other in everywhere:
        needed |= other
    saved = {
        key: shape
        for key, shape in saved.items()
        if not (weights_only and key.startswith(OPTIMIZER_PREFIX))
    }
    wrong = [
        *(f"{key} is missing" for key in sorted(needed.keys() - saved.keys())),
        *(f"{key} is extra" for key in sorted(saved.keys() - needed.keys())),
        *(
            f"{key} has shape {list(saved[key])} instead of {list(needed[key])}"
            for key in sorted(needed.keys() & saved.keys())
            if saved[key] != needed[key]
        ),
    ]
    if wrong:
        shown = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if wrong[20:] else "")
        raise CheckpointMismatch(f"{path} does not fit this model: {shown}")


def _saved_shapes(path: Path) -> _Shapes:
    try:
        if model_files.holds_model(path):
            return model_files.shapes(path)
        return safe_reader.shapes(safe_reader.read_metadata(path))
    except (WeightsError, safe_reader.Unreadable) as error:
        raise DamagedCheckpoint(str(error)) from None


def _shapes(entries: dict[str, Sharded], prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        prefix + tensor.key: tuple(tensor.global_shape)
        for entry in entries.values()
        for tensor in _tensors(entry)
    }


def _tensors(entry: Sharded) -> Iterator[ShardedTensor]:
    yield from nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]


def _with_data(entry: Sharded, data: torch.Tensor, prefix: str) -> Sharded:
    changes: dict[str, Any] = {"key": prefix + entry.key, "data": data}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(entry, **changes)


def _load_into(
    path: Path,
    entries: dict[str, Sharded],
    prefix: str,
    put: _Put,
) -> None:
    def empty(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        dtype = torch.float64 if tensor.dtype is torch.float64 else dtype
        return torch.empty(tensor.shape, dtype=dtype)

    wanted = {n: _with_data(e, empty(e.data), prefix) for n, e in entries.items()}
    if model_files.holds_model(path):
        for name, whole in model_files.read(Safetensors(path), wanted):
            put(entries[name].data, whole)
        return
    loaded = _read(path, wanted)
    for name, entry in entries.items():
        put(entry.data, loaded[name])


def _read(path: Path, wanted: dict[str, Sharded]) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor. The engine tells every rank when one could not read."""
    try:
        return dist_checkpointing.load(
            wanted,
            str(path),
            TorchDistLoadShardedStrategy(),
            safe_reader.NoCommonState(),
            # The ranks together read each element of each tensor once.
            validate_access_integrity=True,
        )
    except CheckpointException as failure:
        error: BaseException = next(iter(failure.failures.values()))[0]
    except (CheckpointingException, OSError, ValueError, TypeError, RecursionError) as found:
        error = found
    raise DamagedCheckpoint(f"its tensors cannot be read ({safe_reader.reason(error)})")


def _check_every_parameter_has_a_part(chunks: Sequence[Any], by_parameter: dict[Any, Part]) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and parameter not in by_parameter:
                raise CheckpointMismatch(f"the optimizer does not hold {name}")


def _random_state_entry(data: Any) -> ShardedObject:
    size, rank = dist.get_world_size(), dist.get_rank()
    return ShardedObject(_RANDOM, data, (size,), (rank,), replica_id=0)


def _random_states() -> dict[str, Any]:
    # The backend has pointed the engine's "CUDA" generator at its own device.
    return {
        "torch": torch.get_rng_state(),
        "engine": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
        "device": random._get_cuda_rng_state(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["engine"])
    random._set_cuda_rng_state(states["device"])
