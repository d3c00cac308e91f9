"""How megatron-core, written for CUDA, is pointed at another device.

It names CUDA in three ways: through `torch.cuda.…`, through the string "cuda" in
`device="cuda"`, and through type names such as "torch.cuda.FloatTensor". Each is redirected inside
megatron-core's own modules only: their global `torch` becomes a view of torch whose `cuda` is
another namespace, and the string constants of their functions are replaced. torch itself, and
everybody else who uses it, sees no change.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pangu import backends
from pangu.backends import Backend, InPlaceOfCuda, cuda
from pangu.engines.megatron import patches
from pangu.ops import trial

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


PREFIX = "megatron.core"
_fitted = False


def select_backend(
    name: str = "auto", local_rank: int = 0, precision: str = "auto", *, try_kernels: bool = True
) -> Backend:
    """Choose the device of this process and fit megatron-core to it, once: nothing may have
    imported megatron-core before. Our own kernels are tried (`pangu.ops.trial`), unless it is they
    that are to be looked at.

    Raises:
        RuntimeError: the backend's device or library is missing; the message says which.
        LookupError: this megatron-core is not the one that the patches were written for.
    """
    global _fitted
    backend = backends.select(name, local_rank)
    if not _fitted:
        _fitted = True
        import_engine(jit=backend.in_place_of_cuda is None)
        if backend.in_place_of_cuda is not None:
            redirect(backend.in_place_of_cuda, precision)
        patches.apply(backend.in_place_of_cuda, precision)
        line = trial.keep_what_holds(cuda.PLAIN) if try_kernels else ""
        if line and local_rank == 0:
            print(f"note: {line}", file=sys.stderr)
    return backends.current()


def import_engine(*, jit: bool) -> None:
    """Import all of megatron-core that we use.

    `jit=False` keeps its small fusions as plain Python: compiling them needs a compiler and
    minutes on a CPU, and torch-npu's inductor is not everywhere.
    """
    # The engine warns about optional packages (apex, Transformer Engine) at every import.
    with warnings.catch_warnings(), _plain_functions(not jit):
        warnings.simplefilter("ignore")
        for name in ENGINE_MODULES:
            importlib.import_module(name)


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


def redirect(stand_in: InPlaceOfCuda, precision: str) -> None:
    """Point megatron-core's loaded modules at another device.

    Raises:
        LookupError: a name of CUDA is left in one of its functions.
    """
    constants = {"cuda": stand_in.device_type}
    for kind in ("Float", "Half", "BFloat16"):
        constants[f"torch.cuda.{kind}Tensor"] = f"{stand_in.tensor_prefix}.{kind}Tensor"
    if precision == "fp64":
        # The engine knows no float64 optimizer; what it does to its float32 parameters is what
        # float64 ones need.
        constants["torch.cuda.FloatTensor"] = f"{stand_in.tensor_prefix}.DoubleTensor"
    view = types.ModuleType("torch", "torch, with another device in the place of cuda")
    view.__dict__.update(torch.__dict__)
    view.__dict__.update(stand_in.torch_names)
    view.__dict__["cuda"] = stand_in.namespace
    for module in _engine_modules():
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = view
        for function in _functions(module):
            function.__code__ = _replaced(function.__code__, constants)
            defaults = function.__defaults__ or ()
            function.__defaults__ = tuple(_replaced(each, constants) for each in defaults) or None
    if left := sorted(_functions_with(set(constants))):
        raise LookupError(f"megatron-core still names CUDA in {', '.join(left)}")


def _engine_modules() -> list[types.ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(PREFIX) and module]


def _functions(holder: types.ModuleType | type) -> Iterator[types.FunctionType]:
    """All functions and methods that a module or class of the engine defines, under whatever
    decorators."""
    name = getattr(holder, "__name__" if isinstance(holder, types.ModuleType) else "__module__")
    for value in list(vars(holder).values()):
        if isinstance(value, type) and value.__module__ == name and value is not holder:
            yield from _functions(value)
            continue
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        for member in (value.fget, value.fset) if isinstance(value, property) else (value,):
            if getattr(member, "__module__", None) == name and callable(member):
                function = inspect.unwrap(member)
                if isinstance(function, types.FunctionType):
                    yield function


def _functions_with(constants: set[str]) -> set[str]:
    """Names of all living functions of the engine in which one of the constants stands, found
    without looking at how its modules hold them."""
    folders = tuple(importlib.import_module("megatron.core").__path__)
    return {
        f"{each.__module__}.{each.__qualname__}"
        for each in gc.get_objects()
        if type(each) is types.FunctionType
        and each.__code__.co_filename.startswith(folders)
        and any(_stands_in(value, constants) for value in (each.__code__, each.__defaults__))
    }


def _stands_in(value: object, constants: set[str]) -> bool:
    if isinstance(value, types.CodeType):
        value = value.co_consts
    if isinstance(value, tuple):
        return any(_stands_in(item, constants) for item in value)
    return isinstance(value, str) and value in constants


def _replaced(value: Any, constants: Mapping[str, str]) -> Any:
    """A constant, tuple or code object with the strings in it replaced."""
    if isinstance(value, str):
        return constants.get(value, value)
    if isinstance(value, tuple):
        return tuple(_replaced(item, constants) for item in value)
    if isinstance(value, types.CodeType):
        replaced = _replaced(value.co_consts, constants)
        return value if replaced == value.co_consts else value.replace(co_consts=replaced)
    return value
