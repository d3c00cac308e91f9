"""A converted model beside transformers: the same logits on a few tokens, read from what is on the
disk. The one is gone before the other is loaded."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.checkpoint import WeightsError
from pangu.machine_check import memory_bytes
from pangu.trained_model import one_process, read_run_config

if TYPE_CHECKING:
    import torch

_TOKENS = 24
# Of the largest logit; the sum of float32 rounding is a hundredth of it.
_FARTHEST = 1e-3


def compared(ours: Path, theirs: Path, *, own_class: bool, dtype: torch.dtype | None = None) -> str:
    """How a model of ours in the folder, run or checkpoint `ours` and transformers' of `theirs`, a
    folder or a `.gguf` file, agree; or why they were not compared. `own_class`: a class that is
    beside the weights is ours, and may run. `dtype` is what weights were rounded to on their way
    out.

    Raises:
        WeightsError: their logits are not the same.
    """
    try:
        with _quiet():
            import transformers  # noqa: F401
    except ImportError:
        return "not compared with transformers, which is not installed (pip install transformers)"
    from pangu.weights import model_folder

    path, config, source = model_folder.opened(ours)
    needed = 4 * sum(math.prod(source.shape(name)) for name in source.names())
    if (free := _free_bytes()) < 1.3 * needed:
        gib = f"{needed / 2**30:.1f} GiB in float32, and {free / 2**30:.1f} GiB are free"
        return f"not compared with transformers: the model takes {gib}"
    rows = _rows(config.model.vocab_size, config.model.max_position_embeddings)
    with _quiet():
        expected = _theirs(theirs, rows, own_class)
    if isinstance(expected, str):
        return f"not compared with transformers: {expected}"
    found = _ours(path, rows, dtype)
    apart = float((found[..., : expected.size(-1)] - expected).abs().max())
    largest = float(expected.abs().max())
    if not apart <= _FARTHEST * max(1.0, largest):
        raise WeightsError(
            f"{theirs} and {ours} are not the same model: on {rows.numel()} tokens transformers' "
            f"logits, up to {largest:.3g}, and ours are {apart:.3g} apart"
        )
    return f"logits on {rows.numel()} tokens within {apart:.1e} of transformers'"


def _free_bytes() -> int:
    import psutil

    return min(memory_bytes(), psutil.virtual_memory().available)


def _rows(vocabulary: int, positions: int) -> torch.Tensor:
    """Ids `[2, seq]`, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (2, min(_TOKENS, positions)), generator=generator)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own words and bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(before)
            logging.enable_progress_bar()


def _theirs(path: Path, rows: torch.Tensor, own_class: bool) -> torch.Tensor | str:
    """Logits `[batch, seq, vocabulary]`, float32; or why transformers does not compute them."""
    import torch

    if path.suffix != ".gguf":
        from pangu.checkpoint.tensor_files import read_json

        if reason := _not_run(read_json(path / "config.json"), own_class):
            return reason
    try:
        model = _of_gguf(path) if path.suffix == ".gguf" else _of_folder(path, own_class)
        with torch.no_grad():
            return model.eval()(rows).logits.float()
    except Exception as error:  # whatever the file leads it to
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"transformers does not run {path} ({reason}); --no-check leaves it out"
        ) from None


def _of_folder(path: Path, own_class: bool) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from pangu.checkpoint.tensor_files import read_json

    fields = read_json(path / "config.json")
    words: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    words |= {"use_safetensors": True, "trust_remote_code": "auto_map" in fields and own_class}
    if plain := _dequantised(fields):
        words["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, **words)
    return model.float() if plain else model  # 4-bit floats become bfloat16


def _of_gguf(path: Path) -> torch.nn.Module:
    """Its numbers under transformers' names; to read the file itself it wants a package more."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pangu.weights.gguf_file import Gguf

    source = Gguf(path)
    config = AutoConfig.for_model(**source.fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name in source.names():
            model.get_parameter(name).copy_(source.read(name))
    return model


def _not_run(fields: dict[str, Any], own_class: bool) -> str:
    """Why transformers does not compute the model of a config.json; "" if it does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    (name,) = fields["architectures"]
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        if "auto_map" not in fields:
            return f"it has no {name}"
        if not own_class:
            return f"{name} is code that came with the model, and is not run"
    groups = fields.get("quantization_config", {}).get("config_groups", {})
    if any(group["input_activations"] for group in groups.values()):
        return "it rounds activations in other steps"
    if groups:
        try:
            import compressed_tensors  # noqa: F401
        except ImportError:
            return "quantised weights want pip install compressed-tensors"
    return ""


def _dequantised(fields: dict[str, Any]) -> bool:
    """Whether packed weights fit into transformers' model only as floats: zero points, 4-bit
    floats."""
    groups = fields.get("quantization_config", {}).get("config_groups", {})
    weights = [group["weights"] for group in groups.values()]
    return any(not one["symmetric"] or one["type"] == "float" for one in weights)


def _ours(path: Path, rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Logits `[batch, seq, vocabulary]`, float32."""
    import torch

    config = read_run_config(path)
    with one_process(config, "cpu"):
        from pangu.checkpoint import restore
        from pangu.inference.forward import whole_logits
        from pangu.model.build import build_model

        (model,), _ = build_model(config)
        restore.load_model(path, [model])
        with torch.no_grad():
            for parameter in model.parameters() if dtype else ():
                parameter.copy_(parameter.to(dtype))
            return whole_logits(model.eval(), rows).float()
