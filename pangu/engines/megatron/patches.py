"""Everything that is changed inside megatron-core 0.16.1: one line of a table for each patch.

Beside these, `fitting` redirects the names of CUDA in all of its modules.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import queue
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pangu.backends import InPlaceOfCuda
from pangu.ops.rotary import rotary
from pangu.ops.swiglu import swiglu


@dataclass(frozen=True)
class Patch:
    """One change. `symbol` is `module:name` inside `megatron.core`; `apply` is given the object
    that holds it (a module or a class), its last name, and what stands in the place of CUDA.

    `test` is the file whose tests fail without the patch, or once the symbol moves.
    """

    symbol: str
    where: Literal["everywhere", "off CUDA", "float64 off CUDA"]
    reason: str
    apply: Callable[[Any, str, Any], None]
    test: str

    def holder(self) -> tuple[Any, str]:
        """The object that has the symbol, and the symbol's last name.

        Raises:
            LookupError: the engine has it no longer.
        """
        module, _, path = self.symbol.partition(":")
        *parents, name = path.split(".")
        try:
            holder = importlib.import_module(f"megatron.core.{module}")
            holder = functools.reduce(getattr, parents, holder)
            getattr(holder, name)
        except (ImportError, AttributeError):
            raise LookupError(
                f"megatron.core.{self.symbol} is gone, and was patched: {self.reason}"
            ) from None
        return holder, name


def apply(stand_in: InPlaceOfCuda | None, precision: str) -> None:
    """All patches that this backend and precision need.

    Raises:
        LookupError: megatron-core no longer has what is patched.
    """
    for patch in PATCHES:
        off_cuda = stand_in is not None and (precision == "fp64" or "float64" not in patch.where)
        if patch.where == "everywhere" or off_cuda:
            patch.apply(*patch.holder(), stand_in)


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


def _move_by_type(holder: Any, name: str, stand_in: InPlaceOfCuda) -> None:
    rename_tensor_method(getattr(holder, name), "cuda", stand_in.tensor_method)


def _stay_double(holder: Any, name: str, stand_in: InPlaceOfCuda) -> None:
    rename_tensor_method(getattr(holder, name), "float", "double")


def _read_generator(holder: Any, name: str, stand_in: InPlaceOfCuda) -> None:
    setattr(holder, name, lambda *args, **kwargs: stand_in.namespace.get_rng_state())


def _write_generator(holder: Any, name: str, stand_in: InPlaceOfCuda) -> None:
    setattr(holder, name, lambda state, *args, **kwargs: stand_in.namespace.set_rng_state(state))


def _real_wrappers_alone(holder: Any, name: str, stand_in: InPlaceOfCuda | None) -> None:
    setattr(holder, name, getattr(holder, name) and isinstance(holder.TELinear, type))


def _our_rotary(holder: Any, name: str, stand_in: InPlaceOfCuda | None) -> None:
    theirs = getattr(holder, name)

    def turned(
        x: torch.Tensor,
        angles: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> torch.Tensor:
        if rotary_interleaved or x.dim() != 4 or angles.size(1) != 1:
            return theirs(x, angles, rotary_interleaved, multi_latent_attention, mscale)
        return rotary(x, angles, pairs=multi_latent_attention, scale=mscale)

    setattr(holder, name, turned)


def _our_swiglu(holder: Any, name: str, stand_in: InPlaceOfCuda | None) -> None:
    def biased(x: torch.Tensor, bias: torch.Tensor | None, *ignored: bool) -> torch.Tensor:
        return swiglu(x if bias is None else x + bias)

    setattr(holder, name, biased)


def _float8_off(holder: Any, name: str, stand_in: InPlaceOfCuda | None) -> None:
    module = importlib.import_module(holder.__module__)
    if not module.HAVE_TE:
        getattr(holder, name).__defaults__ = (None,)


def _no_server(holder: Any, name: str, stand_in: InPlaceOfCuda | None) -> None:
    # Of this process: the engine's own save, which waits, writes and reads it here; our saver's
    # results come through a pipe.
    setattr(holder, name, queue.Queue())


def _read_without_executing(holder: Any, name: str, stand_in: Any) -> None:
    from pangu.engines.megatron import safe_reader  # it imports the engine

    safe_reader.replace_reader(holder, name)


def _hand_over_turns(holder: Any, name: str, stand_in: Any) -> None:
    from pangu.engines.megatron import overlap  # it imports the engine

    signature = inspect.signature(getattr(holder, name))

    def beside(*given: Any, **named: Any) -> tuple[Any, Any, Any]:
        call = signature.bind(*given, **named)
        call.apply_defaults()
        return overlap.forward_beside_backward(types.SimpleNamespace(**call.arguments))

    setattr(holder, name, beside)


def _no_streams(holder: Any, name: str, stand_in: Any) -> None:
    setattr(holder, name, lambda: None)


PATCHES = (
    Patch(
        "transformer.multi_latent_attention:HAVE_TE",
        "everywhere",
        "it takes the presence of its own wrappers for that of Transformer Engine, and then tests "
        "isinstance(module, None)",
        _real_wrappers_alone,
        "tests/model/test_against_transformers.py",
    ),
    Patch(
        "models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        "everywhere",
        "it writes both halves, turned and unturned, before it adds them; the backend says how",
        _our_rotary,
        "tests/training/test_kernel_steps.py",
    ),
    Patch(
        "transformer.mlp:bias_swiglu_impl",
        "everywhere",
        "its SwiGLU is written for a compiler that fuses it, and run as it is writes every "
        "intermediate; on CUDA too the backend says which it is",
        _our_swiglu,
        "tests/model/test_kept_activations.py",
    ),
    Patch(
        "tensor_parallel.random:CheckpointWithoutOutput.__init__",
        "everywhere",
        "`fp8 is not None` takes its own default, False, for FP8, and calls Transformer Engine",
        _float8_off,
        "tests/training/test_recompute.py",
    ),
    Patch(
        "pipeline_parallel.combined_1f1b:combined_forward_backward_step",
        "everywhere",
        "it cuts layers into pieces of its own dispatchers and Transformer Engine's linears, for "
        "streams of CUDA; ours are passes that hand each other the turn",
        _hand_over_turns,
        "tests/training/test_overlap.py",
    ),
    Patch(
        "pipeline_parallel.combined_1f1b:set_streams",
        "everywhere",
        "it makes streams of CUDA for those pieces",
        _no_streams,
        "tests/training/test_overlap.py",
    ),
    Patch(
        "dist_checkpointing.strategies.torch:_get_filesystem_reader",
        "everywhere",
        "its reader unpickles a checkpoint's .metadata and objects, which executes what they say",
        _read_without_executing,
        "tests/checkpoint/test_hostile.py",
    ),
    Patch(
        "dist_checkpointing.strategies.filesystem_async:_results_queue",
        "everywhere",
        "it would start a server process for its results, which outlives a killed run",
        _no_server,
        "tests/engines/test_patches.py",
    ),
    Patch(
        "models.common.language_module.language_module:"
        "LanguageModule.setup_embeddings_and_output_layer",
        "off CUDA",
        "tied embeddings are moved to the device with tensor.cuda()",
        _move_by_type,
        "tests/training/test_layouts.py",
    ),
    Patch(
        "models.common.embeddings.rope_utils:get_pos_emb_on_this_cp_rank",
        "off CUDA",
        "rotary slices are moved to the device with tensor.cuda()",
        _move_by_type,
        "tests/training/test_layouts.py",
    ),
    Patch(
        "tensor_parallel.random:_get_cuda_rng_state",
        "off CUDA",
        "it reaches into torch._C for the generators of CUDA",
        _read_generator,
        "tests/checkpoint/test_checkpoint.py",
    ),
    Patch(
        "tensor_parallel.random:_set_cuda_rng_state",
        "off CUDA",
        "it reaches into torch._C for the generators of CUDA",
        _write_generator,
        "tests/checkpoint/test_checkpoint.py",
    ),
    Patch(
        "optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",
        "float64 off CUDA",
        "it knows no float64 and makes float32 of every gradient",
        _stay_double,
        "tests/engines/test_patches.py",
    ),
)
