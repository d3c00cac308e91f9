"""Every patch of megatron-core: its symbol is there, its test exists, and it does what it says."""

import ast
import importlib
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pangu.engines.megatron import fitting, patches

fitting.select_backend("cpu")
ROOT = Path(__file__).parents[2]
# In a process of its own, where the engine is as it came. Every patch must change something.
CHANGES = """
from pangu.engines.megatron import fitting, patches
from pangu.backends import cpu

fitting.import_engine(jit=False)

def state(patch):
    value = getattr(*patch.holder())
    return (value, getattr(value, "__code__", None), getattr(value, "__defaults__", None))

stand_in = cpu.create(0).in_place_of_cuda
for patch in patches.PATCHES:
    before = state(patch)
    patch.apply(*patch.holder(), stand_in)
    assert state(patch) != before, patch.symbol
print(len(patches.PATCHES))
"""


def test_every_patch_still_changes_the_engine():
    done = subprocess.run([sys.executable, "-c", CHANGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(patches.PATCHES)


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.symbol)
def test_every_patch_names_a_test(patch):
    tree = ast.parse((ROOT / patch.test).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node for node in functions if node.name.startswith("test_")]


def test_a_symbol_that_is_gone_is_named():
    patch = patches.Patch("optimizer.clip_grads:no_such", "everywhere", "why", print, "")
    with pytest.raises(LookupError, match=r"clip_grads:no_such is gone, and was patched: why"):
        patch.holder()


def test_a_method_that_moved_is_reported():
    def function(tensor):
        return tensor.cuda()

    patches.rename_tensor_method(function, "cuda", "cpu")
    assert function(torch.ones(1)).device.type == "cpu"
    with pytest.raises(LookupError, match="no longer uses the name cuda"):
        patches.rename_tensor_method(function, "cuda", "cpu")


def test_a_save_starts_no_server():
    strategy = importlib.import_module(
        "megatron.core.dist_checkpointing.strategies.filesystem_async"
    )
    before = multiprocessing.active_children()
    results = strategy._get_write_results_queue()
    assert multiprocessing.active_children() == before
    results.put("written")  # the engine's own save goes through it all the same
    assert results.get_nowait() == "written"


def test_float64_gradients_stay_float64():
    script = """
from pangu.engines.megatron.fitting import select_backend
select_backend("cpu", precision="fp64")
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
code = DistributedOptimizer._copy_model_grads_to_main_grads.__code__
inner = [each for each in code.co_consts if hasattr(each, "co_names")]
names = {name for each in (code, *inner) for name in each.co_names}
print("double" in names, "float" in names)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
