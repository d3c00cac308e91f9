"""How megatron-core, written for CUDA, is pointed at another device.

It names CUDA in three ways: through `torch.cuda.…`, through the string "cuda" in
`device="cuda"`, and through type names such as "torch.cuda.FloatTensor". Each is redirected inside
megatron-core's own modules only: their global `torch` becomes a view of torch whose `cuda` is
another namespace, and the string constants of their functions are replaced. torch itself, and
everybody else who uses it, sees no change.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Everything of the engine that we use: imported here, at once, so that no module is left unfitted.
ENGINE_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.process_groups_config",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.shared_experts",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.inference.contexts",
)


def import_engine(*, jit: bool) -> list[types.ModuleType]:
    """Import megatron-core and return its loaded modules.

    `jit=False` keeps its small fusions as plain Python: compiling them needs a compiler and
    minutes on a CPU, and torch-npu's inductor is not everywhere.
    """
    # The engine warns about optional packages (apex, Transformer Engine) at every import.
    with warnings.catch_warnings(), _plain_functions(not jit):
        warnings.simplefilter("ignore")
        for name in ENGINE_MODULES:
            importlib.import_module(name)
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    # It takes the presence of its own wrappers for that of Transformer Engine, and then tests
    # `isinstance(module, None)`.
    latent.HAVE_TE = latent.HAVE_TE and isinstance(latent.TELinear, type)
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    # Without apex or Transformer Engine its clipping multiplies into new tensors and copies back.
    if clip.multi_tensor_scale_impl is clip.local_multi_tensor_scale:
        clip.multi_tensor_scale_impl = _scale_in_place
    recompute: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # `fp8 is not None` takes its own default, False, for FP8, and then calls Transformer Engine.
    if not recompute.HAVE_TE:
        recompute.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    prefix = "megatron.core"
    return [module for name, module in sys.modules.items() if name.startswith(prefix) and module]


def _scale_in_place(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], scale: float
) -> None:
    """lists[1] = lists[0] * scale; clipping passes the same tensors twice."""
    for source, target in zip(*lists, strict=True):
        if source is target:
            target.mul_(scale)
        else:
            torch.mul(source, scale, out=target)


@contextlib.contextmanager
def _plain_functions(active: bool) -> Iterator[None]:
    """While active, `torch.compile` returns its function. The engine decorates its fusions before
    anybody can call its `disable_jit_fuser`."""
    compile_function = torch.compile
    try:
        if active:
            torch.compile = lambda function: function  # type: ignore[assignment]
        yield
    finally:
        torch.compile = compile_function


def redirect(
    modules: list[types.ModuleType],
    cuda: object,
    constants: Mapping[str, str],
    torch_names: Mapping[str, object] | None = None,
) -> int:
    """Point megatron-core's modules at another device.

    `cuda` stands for `torch.cuda`; `constants` maps each string constant to its replacement;
    `torch_names` replaces further names of torch.
    Returns how many functions had a constant replaced.
    """
    view = types.ModuleType("torch", "torch, with another device in the place of cuda")
    view.__dict__.update(torch.__dict__)
    view.__dict__["cuda"] = cuda
    view.__dict__.update(torch_names or {})
    replaced = 0
    for module in modules:
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = view
        for function in _functions(module):
            replaced += _replace_constants(function, constants)
    return replaced


def rename_tensor_method(function: types.FunctionType, old: str, new: str) -> None:
    """Make a function call `tensor.new()` where it was written to call `tensor.old()`.

    Raises:
        LookupError: the function does not use that name (the engine has changed).
    """
    code = _with_names(function.__code__, old, new)
    if code is function.__code__:
        raise LookupError(f"{function.__qualname__} no longer uses the name {old}")
    function.__code__ = code


def _with_names(code: types.CodeType, old: str, new: str) -> types.CodeType:
    names = tuple(new if name == old else name for name in code.co_names)
    constants = tuple(
        _with_names(value, old, new) if isinstance(value, types.CodeType) else value
        for value in code.co_consts
    )
    if names == code.co_names and constants == code.co_consts:
        return code
    return code.replace(co_names=names, co_consts=constants)


def _functions(module: types.ModuleType) -> list[types.FunctionType]:
    """All functions and methods that a module defines."""
    found: list[types.FunctionType] = []
    for value in list(module.__dict__.values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members: list[Any] = list(vars(value).values()) if isinstance(value, type) else [value]
        for member in members:
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            if isinstance(member, property):
                member = member.fget
            member = getattr(member, "__wrapped__", member)
            if isinstance(member, types.FunctionType):
                found.append(member)
    return found


def _replace_constants(function: types.FunctionType, constants: Mapping[str, str]) -> int:
    code = _renamed(function.__code__, constants)
    defaults = function.__defaults__ or ()
    function.__defaults__ = (
        tuple(
            constants.get(value, value) if isinstance(value, str) else value for value in defaults
        )
        or None
    )
    if code is function.__code__:
        return 0
    function.__code__ = code
    return 1


def _renamed(code: types.CodeType, constants: Mapping[str, str]) -> types.CodeType:
    def rename(value: object) -> object:
        if isinstance(value, str):
            return constants.get(value, value)
        if isinstance(value, types.CodeType):
            return _renamed(value, constants)
        if isinstance(value, tuple):
            return tuple(rename(item) for item in value)
        return value

    renamed = tuple(rename(value) for value in code.co_consts)
    return code if renamed == code.co_consts else code.replace(co_consts=renamed)
