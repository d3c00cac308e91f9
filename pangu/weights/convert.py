"""Models in and out of Hugging Face's format, one tensor at a time.

Every tensor of both sides is accounted for exactly once; the stored dtype stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from configs import shape_rules
from configs.compose import load
from configs.run_rules import bounds
from configs.schema import Config
from pangu.checkpoint.tensor_files import Safetensors, Source, WeightsError, read_json
from pangu.data import DataError
from pangu.data.tokenizer import load_tokenizer
from pangu.weights import (
    architectures,
    compressed_tensors,
    model_folder,
    remote_code,
    tensor_names,
)
from pangu.weights.gguf_file import Gguf
from pangu.weights.links import Link
from pangu.weights.lora import merged
from pangu.weights.quantized_file import Quantized
from pangu.weights.writer import ModelFolder, finite
from simulator.api import count_parameters

Progress = Callable[[Iterable[Link]], Iterable[Link]]
# Buffers that old files hold and the model computes anew.
_COMPUTED = ("rotary_emb.inv_freq",)


def import_model(path: Path, out: Path, progress: Progress = iter) -> Config:
    """Write the model of a Hugging Face folder, or of a `.gguf` file, as a folder of ours.

    Raises:
        WeightsError: the model cannot be read, is of an unknown class, or its tensors are not
            exactly those of its configuration; nothing is left at `out`.
    """
    gguf = path.suffix == ".gguf"
    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    if (path / model_folder.CONFIG).is_file():
        raise WeightsError(f"{path} is a model of ours already: no import, export takes it")
    source: Gguf | Safetensors = Gguf(path) if gguf else Safetensors(path)
    fields = source.fields if isinstance(source, Gguf) else read_json(path / "config.json")
    kind = architectures.architecture_of(fields)
    config = _config(fields, path.stem if gguf else path.resolve().name)
    wanted = tensor_names.links(config, kind, set(source.names()))
    account(wanted, source, tensor_names.copies(config), str(path))
    with ModelFolder(out) as folder:
        numbers = 0
        for link in progress(wanted):
            whole = _joined(source, link, path)
            folder.add(link.ours, whole)
            numbers += 0 if link.ours.endswith("expert_bias") else whole.numel()
        if numbers != (asked := count_parameters(config).allocated):
            raise WeightsError(
                f"{path} is not the model of its configuration: its tensors hold {numbers:,} "
                f"numbers, and sizes in config.json ask for {asked:,}"
            )
        folder.finish()
        kept = folder.partial / model_folder.HUGGING_FACE
        _keep_companions(source, path, kept)
        _keep_tokenizer(path, kept, folder.partial / model_folder.TOKENIZER, fields)
        model_folder.describe(folder, config)
        model_folder.seal(folder)
    return config


def _joined(source: Source, link: Link, path: Path) -> torch.Tensor:
    parts = [_read(source, name) for name in link.theirs]
    try:
        return link.join(parts)
    except RuntimeError:  # torch's, of shapes that do not go together
        shapes = ", ".join(str(list(part.shape)) for part in parts[:3])
        raise WeightsError(
            f"{path}: {link.theirs[0]} {shapes} does not fit the sizes in config.json"
        ) from None


def _config(fields: architectures.Fields, name: str) -> Config:
    model, moe = architectures.model_of(fields, name)
    config = load([])
    config.model, config.moe = model, moe
    bounded, problems = bounds(config)
    problems += [*shape_rules.attention(bounded), *shape_rules.experts(bounded)]
    if problems:
        one = problems[0]
        reason = f"{one.key}={one.value}: {one.reason}"
        raise WeightsError(f"config.json does not describe a model: {reason}")
    config.train.seq_length = min(config.train.seq_length, model.max_position_embeddings)
    return config


def _read(source: Source, name: str) -> torch.Tensor:
    tensor = source.read(name)
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise WeightsError(f"{name} is stored as {kind}: float32, bfloat16 or float16 can be read")
    return finite(name, tensor)


def account(wanted: list[Link], source: Source, copies: dict[str, str], where: str) -> None:
    """Compare names and shapes of what is needed with what is there.

    Raises:
        WeightsError: naming every tensor that is missing or extra.
    """
    needed = [name for link in wanted for name in link.theirs]
    there = set(source.names())
    missing = [name for name in needed if name not in there]
    extra = there - set(needed)
    for copy in extra & copies.keys():
        if not torch.equal(source.read(copy), source.read(copies[copy])):
            raise WeightsError(f"{where}: {copy} should be a copy of {copies[copy]} and is not")
    extra -= copies.keys()
    odd = sorted(name for name in extra if not name.endswith(_COMPUTED))
    if missing or odd:
        parts = [f"{_some(missing)} missing"] if missing else []
        parts += [f"{_some(odd)} extra"] if odd else []
        raise WeightsError(f"{where} is not the model of its configuration: {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more are" if len(names) > 5 else f"{shown} is"


def _keep_companions(source: Source, path: Path, kept: Path) -> None:
    if not isinstance(source, Gguf):
        model_folder.copy_companions(path, kept)
        return
    from pangu.weights.gguf_tokenizer import write_tokenizer

    kept.mkdir()
    (kept / "config.json").write_text(json.dumps(source.fields, indent=1) + "\n")
    write_tokenizer(source, kept)


def _keep_tokenizer(path: Path, kept: Path, target: Path, fields: architectures.Fields) -> None:
    """Our tokenizer folder, where the model brings a tokenizer that we read: in `path`, or (of a
    single file) made in `kept`."""
    end = fields.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    for name in ("tokenizer.json", "tokenizer.model"):
        if (kept / name).is_file():
            file = path / name if path.is_dir() else kept / name
            try:
                load_tokenizer(file, eod=end).save(target)
            except DataError as error:
                raise WeightsError(f"the tokenizer cannot be read: {error}") from None
            return


def export_model(
    path: Path, out: Path, progress: Progress = iter, dtype: torch.dtype | None = None
) -> str:
    """Write a folder of ours, or the newest sound checkpoint of a run, as a Hugging Face model; see
    `import_model`; returns the name of its class. Adapters are merged into the weights beside them.
    Floating-point weights become `dtype`, or stay as they are stored.

    Raises:
        WeightsError: it is no folder of ours, or no class of Hugging Face computes its model.
    """
    path, config, source = model_folder.opened(path)
    if config.model.input_transforms:
        raise WeightsError(
            f"{path} turns the inputs of its linears by learned products of two matrices, clipped: "
            "compressed-tensors has no transform that says so, and it runs here alone"
        )
    config, source = merged(config, source)
    codes = Quantized.of(path)
    if codes is not None:  # bits of activations stand in the description of the layout
        model = replace(config.model, activation_bits=0, kv_bits=0, key_rounding="token")
        config = replace(config, model=model)
    fields = architectures.fields_of(config)
    kind = architectures.architecture_of(fields)
    if codes is not None:
        fields["quantization_config"] = compressed_tensors.description(codes.scheme, config, kind)
    wanted = tensor_names.links(config, kind)
    _account_ours(wanted, source, path)
    with ModelFolder(out) as folder:
        written = set()
        for link in progress(wanted):
            whole = _read(source, link.ours)
            # The balancing bias moves in steps that 16 bits do not hold.
            if dtype is not None and not link.ours.endswith("expert_bias"):
                whole = whole.to(dtype)
            written.add(whole.dtype)
            if codes is not None and link.ours in codes.weights:
                for name, part in _codes(link, whole, codes):
                    folder.add(name, part)
                continue
            for name, part in zip(link.theirs, link.split(whole), strict=True):
                # The parts may share one storage, which a file would hold as often.
                folder.add(name, part.clone())
        folder.finish()
        _write_companions(path, folder.partial)
        fields |= remote_code.write(folder.partial, kind, fields)
        _write_config(folder.partial, fields, written)
    (name,) = fields["architectures"]
    return str(name)


def _codes(link: Link, whole: torch.Tensor, codes: Quantized) -> Iterator[tuple[str, torch.Tensor]]:
    """A quantised weight in the layout of compressed-tensors."""
    scale, zero = (link.split(part) for part in codes.parts(link.ours))
    weights = link.split(whole)
    for name, weight, s, z in zip(link.theirs, weights, scale, zero, strict=True):
        s = s.to(whole.dtype)
        for key, part in compressed_tensors.entries(name, weight, s, z, codes.scheme):
            yield key, part.clone()


def _account_ours(wanted: list[Link], source: Source, path: Path) -> None:
    needed, there = {link.ours for link in wanted}, set(source.names())
    if needed != there:
        odd = ", ".join(sorted(needed ^ there)[:5])
        raise WeightsError(f"{path} does not hold the model of its config.yaml: see {odd}")


def _write_companions(path: Path, target: Path) -> None:
    """Tokenizer and settings as they came, or the run's own tokenizer."""
    if (kept := path / model_folder.HUGGING_FACE).is_dir():
        model_folder.copy_companions(kept, target)
    elif (path / model_folder.TOKENIZER).is_dir():
        model_folder.copy_companions(path / model_folder.TOKENIZER, target)


def _write_config(folder: Path, fields: architectures.Fields, written: set[torch.dtype]) -> None:
    """Our fields over those that the model came with, which hold more (token ids, …)."""
    file = folder / "config.json"
    before = read_json(file) if file.is_file() else {}
    if before.get("architectures") != fields["architectures"]:
        before = {key: before[key] for key in before if key.endswith("_token_id")}
    if "num_experts" in fields:  # transformers 5 calls Qwen3-MoE's so, and would believe it more
        before.pop("num_local_experts", None)
    scaling = fields.get("rope_scaling", {"rope_type": "default"})
    theta = {"rope_theta": fields["rope_theta"]} | scaling
    # Of a model with a float32 balancing bias, what the rest is in.
    dtype = str(min(written, key=lambda one: one.itemsize)).removeprefix("torch.")
    merged = before | fields | {"rope_parameters": theta, "dtype": dtype, "torch_dtype": dtype}
    file.write_text(json.dumps(merged, indent=1) + "\n")
