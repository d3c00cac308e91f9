"""The one place where code travels with weights: no class of transformers has a patch before a
layer, so that a model with patches goes out with a small class of its own."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights.architectures import PATCHED, Architecture

_MODULE = "modeling_patched"
_CODE = Template('''\
"""$base, with a linear before every layer of `patched_layers` (LinearPatch, arXiv 2505.24680)."""

from torch import nn
from transformers import ${base}Config, ${base}ForCausalLM


class Patched${base}Config(${base}Config):
    model_type = "patched_$kind"


class Patched${base}ForCausalLM(${base}ForCausalLM):
    config_class = Patched${base}Config

    def __init__(self, config):
        super().__init__(config)
        for number in config.patched_layers:
            layer = self.model.layers[number]
            layer.layer_patch = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            layer.register_forward_pre_hook(_patch, with_kwargs=True)


def _patch(layer, args, kwargs):
    if args:
        return (layer.layer_patch(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.layer_patch(kwargs["hidden_states"])}
''')


def write(folder: Path, kind: Architecture) -> dict[str, Any]:
    """Write the class beside the weights in `folder`; returns what config.json says about it.

    Raises:
        WeightsError: transformers has no class to begin with.
    """
    if kind.name == "PanguProMoEForCausalLM":
        raise WeightsError("transformers has no Pangu Pro MoE, so that a patched one cannot go out")
    base = kind.name.removesuffix("ForCausalLM")
    (folder / f"{_MODULE}.py").write_text(_CODE.substitute(base=base, kind=kind.model_type))
    # A type that transformers does not know: without leave to run the class it refuses the model,
    # where it would leave the patches out of one that it knows.
    return {
        "model_type": f"patched_{kind.model_type}",
        "auto_map": {
            "AutoConfig": f"{_MODULE}.{PATCHED}{base}Config",
            "AutoModelForCausalLM": f"{_MODULE}.{PATCHED}{kind.name}",
        },
    }
