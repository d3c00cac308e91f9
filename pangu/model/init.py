"""Initial values that do not depend on the layout.

Every parameter is drawn from a generator seeded by the run's seed and the parameter's global name
(layer and expert numbers counted over the whole model), in full, on the CPU; each rank keeps its
slice. So any split of the same model starts from the same weights, on any device.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from configs.schema import ModelConfig

IDENTITIES = ("layer_patch.weight",)  # a patch that does nothing yet
# A leap head that says what the model's head says, an adapter that does nothing yet.
ZEROS = ("leap_weight", "lora_b")
_LEAP_OUTPUT = re.compile(r"leap_heads\.\d+\.(output_layer\.weight)")
# The residual branches' last matrices, scaled down with depth in the "normal" scheme.
OUTPUTS = ("linear_proj.weight", "linear_fc2.weight", "experts.w2")


def initialize(chunks: list[MegatronModule], model: ModelConfig, seed: int) -> None:
    """Fill the matrices of all model chunks of this rank; norms and biases keep theirs."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    torch.nn.init.zeros_(parameter)
                continue
            if name.endswith(IDENTITIES):
                torch.nn.init.eye_(parameter)
                continue
            if name.endswith(ZEROS):
                torch.nn.init.zeros_(parameter)
                continue
            name = global_name(chunk, name)
            _fill(parameter, name, standard_deviation(name, model), seed)


def global_name(chunk: MegatronModule, name: str) -> str:
    """A parameter's name with its layer counted over the whole model; copies have the name of what
    they copy."""
    if match := _LEAP_OUTPUT.fullmatch(name):
        name = match[1]
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    match = re.match(r"(.*decoder\.layers\.)(\d+)(\..*)", name)
    if not match:
        return name
    layer = chunk.get_submodule(match[1] + match[2])
    return f"{match[1]}{layer.layer_number - 1}{match[3]}"


def standard_deviation(name: str, model: ModelConfig) -> float:
    """Normal: `init_std`, divided by sqrt(2 * layers) at the branches' outputs. TinyInit (Pangu
    Ultra): sqrt(1 / (2 * hidden * layers)) everywhere, 0.5 for the embedding."""
    if model.init == "tiny":
        embedding = "word_embeddings" in name
        return 0.5 if embedding else math.sqrt(1 / (2 * model.hidden_size * model.num_layers))
    scale = math.sqrt(2.0 * model.num_layers) if name.endswith(OUTPUTS) else 1.0
    return model.init_std / scale


def _fill(parameter: torch.nn.Parameter, name: str, std: float, seed: int) -> None:
    experts = getattr(parameter, "global_expert_indices", None)
    with torch.no_grad():
        if experts is None:
            parameter.copy_(_draw(parameter, list(parameter.shape), name, std, seed))
            return
        for i, expert in enumerate(experts):
            shape = list(parameter.shape[1:])
            values = _draw(parameter, shape, f"{name}.{expert}", std, seed)
            parameter[i].copy_(values)


def _draw(
    parameter: torch.nn.Parameter, shape: list[int], name: str, std: float, seed: int
) -> torch.Tensor:
    """This rank's slice of a full matrix. `shape` is the slice's."""
    dim, stride, rank, size = _sharding(parameter, name)
    full = list(shape)
    if size > 1:
        full[dim] *= size
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.randn(full, generator=generator) * std
    if size == 1:
        return values
    # stride 2: the matrix is two stacked parts (gate and up), each of them split over the ranks
    parts = values.chunk(stride, dim)
    return torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)


def _sharding(parameter: Any, name: str) -> tuple[int, int, int, int]:
    """(dimension, stride, rank, size) of a parameter's split."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1, 0, 1
    dim = parameter.partition_dim
    if hasattr(parameter, "global_expert_indices"):
        group = parallel_state.get_expert_tensor_parallel_group()
        return dim - 1, parameter.partition_stride, group.rank(), group.size()
    group = parallel_state.get_tensor_model_parallel_group()
    gated = name.endswith("linear_fc1.weight") and parameter.gated
    return dim, 2 if gated else 1, group.rank(), group.size()
