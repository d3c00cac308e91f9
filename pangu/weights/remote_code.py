"""The one place where code travels with weights: no class of transformers has a patch before a
layer, or the router of a carved MLP; such a model goes out with a small class of its own."""

from __future__ import annotations

from pathlib import Path
from string import Template

from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights.architectures import Architecture, Fields

_MODULE = "modeling_pangu"
_CODE = Template('''\
"""$base with a linear before every layer of `patched_layers` (LinearPatch, arXiv 2505.24680), and
where `carved` says so with experts in the place of its MLPs (CMoE, arXiv 2502.04416)."""

import copy

import torch
from torch import nn
from transformers import ${base}Config, ${base}ForCausalLM


class ${own}Config(${base}Config):
    model_type = "$type"


class ${own}ForCausalLM(${base}ForCausalLM):
    config_class = ${own}Config
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}

    def __init__(self, config):
        super().__init__(config)
        for number in getattr(config, "patched_layers", None) or ():
            layer = self.model.layers[number]
            layer.layer_patch = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            layer.register_forward_pre_hook(_patch, with_kwargs=True)
        if getattr(config, "carved", None):
            for layer in self.model.layers:
                layer.mlp = CarvedMLP(config, type(layer.mlp))


def _patch(layer, args, kwargs):
    if args:
        return (layer.layer_patch(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.layer_patch(kwargs["hidden_states"])}


class Gate(nn.Module):
    """Which experts a token has, and their weights; each expert is spoken for by one neuron."""

    def __init__(self, hidden, experts, groups, chosen):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden))
        self.up_weight = nn.Parameter(torch.zeros(experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.groups, self.chosen = groups, chosen

    def forward(self, x, scale):
        """x [tokens, hidden], scale [1, experts] -> weights [tokens, experts], 0 where unchosen."""
        gate, up = (x.float() @ w.float().t() for w in (self.weight, self.up_weight))
        scores = (nn.functional.silu(gate) * up).abs().softmax(-1)
        ranking = (scores + self.e_score_correction_bias.float()).unflatten(-1, (self.groups, -1))
        best = ranking.topk(self.chosen // self.groups, dim=-1).indices
        on = torch.zeros_like(ranking, dtype=torch.bool).scatter(-1, best, True).flatten(-2)
        return (1 + scores * scale.float()) * on


class CarvedMLP(nn.Module):
    def __init__(self, config, mlp):
        super().__init__()
        carved = config.carved
        count, groups = carved["num_experts"], carved["groups"]
        self.gate = Gate(config.hidden_size, count, groups, carved["experts_per_token"])
        self.router_scale = nn.Parameter(torch.zeros(1, count))
        part = copy.deepcopy(config)
        part.intermediate_size = carved["expert_width"]
        self.experts = nn.ModuleList(mlp(part) for _ in range(count))
        self.shared_experts = None
        if carved["shared_width"]:
            part.intermediate_size = carved["shared_width"]
            self.shared_experts = mlp(part)

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, -2)
        weights = self.gate(x, self.router_scale)
        out = torch.zeros_like(x) if self.shared_experts is None else self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            rows = weights[:, number].nonzero()[:, 0]
            part = expert(x[rows]) * weights[rows, number, None].to(x.dtype)
            out = out.index_add(0, rows, part)
        return out.view_as(hidden_states)
''')


def write(folder: Path, kind: Architecture, fields: Fields) -> Fields:
    """Write the class beside the weights in `folder` where no class of transformers computes what
    config.json's `fields` describe; returns what config.json says about it.

    Raises:
        WeightsError: transformers has no class to begin with.
    """
    (name,) = fields["architectures"]
    if name == kind.name:
        return {}
    if kind.name == "PanguProMoEForCausalLM":
        raise WeightsError("transformers has no Pangu Pro MoE, so that a patched one cannot go out")
    base, own = (one.removesuffix("ForCausalLM") for one in (kind.name, name))
    # A type that transformers does not know: without leave to run the class it refuses the model,
    # where it would leave the patches out of one that it knows.
    type_ = f"{own.removesuffix(base).lower()}_{kind.model_type}"
    (folder / f"{_MODULE}.py").write_text(_CODE.substitute(base=base, own=own, type=type_))
    return {
        "model_type": type_,
        "auto_map": {
            "AutoConfig": f"{_MODULE}.{own}Config",
            "AutoModelForCausalLM": f"{_MODULE}.{name}",
        },
    }
