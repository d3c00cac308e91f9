"""What the CPU and NPU backends change in megatron-core is still there to be changed."""

import importlib
import inspect
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from pangu import backends
from pangu.engines.megatron import fitting

fitting.select_backend("cpu")

# The places that stop the engine off CUDA, one per kind of reference. A new release that moves
# one of these needs another look at pangu/backends.
NAMED_BY_CONSTANT = [
    ("megatron.core.optimizer.clip_grads", "get_grad_norm_fp32", "cuda"),
    (
        "megatron.core.optimizer.clip_grads",
        "clip_grad_by_total_norm_fp32",
        "torch.cuda.FloatTensor",
    ),
    (
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._build_model_and_main_param_groups",
        "torch.cuda.FloatTensor",
    ),
    (
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._build_model_and_main_param_groups",
        "torch.cuda.BFloat16Tensor",
    ),
    (
        "megatron.core.pipeline_parallel.schedules",
        "forward_backward_pipelining_without_interleaving",
        "cuda",
    ),
]
NAMED_BY_ATTRIBUTE = [
    (
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule.setup_embeddings_and_output_layer",
        "cuda",
    ),
    ("megatron.core.models.common.embeddings.rope_utils", "get_pos_emb_on_this_cp_rank", "cuda"),
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", "cuda"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "_cuda_setRNGState"),
]
CHECK = """
import functools, importlib
from pangu.engines.megatron.fitting import import_engine
import_engine(jit=False)
for module, name, value in {table}:
    function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    function = getattr(function, "__wrapped__", function)
    code = function.__code__
    assert repr(value) in repr(getattr(code, {where!r})), (module, name, value)
"""


@pytest.mark.parametrize(
    ("table", "where"), [(NAMED_BY_CONSTANT, "co_consts"), (NAMED_BY_ATTRIBUTE, "co_names")]
)
def test_the_engine_still_names_cuda_where_it_is_redirected(table, where):
    # In a process of its own: this one's engine has been redirected already.
    script = CHECK.format(table=table, where=where)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_only_the_engine_sees_another_torch():
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    assert clip.torch.cuda.current_device() == torch.device("cpu")
    assert clip.torch.zeros is torch.zeros
    assert sys.modules["torch"] is torch
    assert isinstance(torch.cuda, types.ModuleType)
    assert "cuda" not in clip.get_grad_norm_fp32.__code__.co_consts


def test_functions_are_found_under_every_decorator():
    """The engine decorates twice in places, and one function of its checkpoints kept its "cuda"."""
    module = types.ModuleType("engine")
    code = """
import contextlib, functools

def logged(function):
    return functools.wraps(function)(lambda: function())

@logged
@logged
def twice(): return "cuda"

class Outer:
    class Inner:
        @property
        def place(self): return "cuda"

    @classmethod
    @logged
    def bound(cls): return "cuda"
"""
    exec(compile(code, "engine.py", "exec"), module.__dict__)
    found = {function.__qualname__ for function in fitting._functions(module)}
    assert {"twice", "Outer.Inner.place", "Outer.bound"} <= found
    exchange = importlib.import_module("megatron.core.dist_checkpointing.exchange_utils")
    rounds = inspect.unwrap(exchange.exchange_loaded_tensors_gather_rounds)
    assert "cuda" not in repr(rounds.__code__.co_consts)


def test_a_name_of_cuda_that_is_left_stops_the_start(monkeypatch):
    monkeypatch.setattr(fitting, "_functions", lambda module: iter(()))
    stand_in = replace(backends.current().in_place_of_cuda, device_type="elsewhere")
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    held = clip.get_grad_norm_fp32.__code__
    monkeypatch.setattr(clip.get_grad_norm_fp32, "__code__", held)  # put back afterwards
    clip.get_grad_norm_fp32.__code__ = fitting._replaced(held, {"cpu": "cuda"})
    with pytest.raises(LookupError, match=r"clip_grads\.get_grad_norm_fp32"):
        fitting.redirect(stand_in, "auto")


def test_a_second_backend_is_refused():
    with pytest.raises(RuntimeError, match="already in use"):
        backends.select("cuda")


def test_npu_without_its_library_says_what_is_missing():
    from pangu.backends import npu

    if importlib.util.find_spec("torch_npu") is not None:
        pytest.skip("torch-npu is installed")
    with pytest.raises(RuntimeError, match="torch_npu"):
        npu.create(0)
