"""`python -m tests.compiled_kernels [short]`: every kernel for a Hopper GPU, without one; `short`
once each.

Operators run on CPU tensors; where they would launch a kernel it is compiled instead, down to the
machine's code, for the very arguments it was given. In JSON, for each kernel and each time: what it
takes of the machine.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / ".triton"))

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pangu import backends

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}
short = sys.argv[1:] == ["short"]
found: dict[str, list[dict[str, int]]] = {}


def compiled(kernel: JITFunction, *given, grid, warmup, **named):
    """What `kernel[grid](*given, **named)` does here."""
    parameters = [parameter.name for parameter in kernel.params]
    options = {name: value for name, value in named.items() if name not in parameters}
    values = dict(zip(parameters, given, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned = True
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=HOPPER, options=options or None)
    name = f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.__name__}"
    takes = {"warps": built.metadata.num_warps, "shared": built.metadata.shared}
    found.setdefault(name, []).append(takes | registers(built.asm["cubin"]))


def registers(machine_code: bytes) -> dict[str, int]:
    """Of a thread, and the bytes of its own memory into which it spills what has no register."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": count["REG"], "spilled": count["STACK"] + count["LOCAL"]}


def norms(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import rms_norm

    for rows, width in ((4096, 2048),) if short else ((4096, 2048), (4096, 7680), (65536, 128)):
        x = torch.ones(rows, width, dtype=dtype, requires_grad=True)
        weight = torch.ones(width, dtype=dtype)
        rms_norm.rms_norm(x, weight, 1e-5, None).backward(x)
        if not short:
            rms_norm.rms_norm(x, weight, 1e-5, x)


def permutations(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import permute

    experts = torch.zeros(1024, 8, dtype=torch.int64)
    order, tokens, slots, _ = permute.sort_choices(experts, 128)
    rows = permute.gather(torch.ones(1024, 2048, dtype=dtype), tokens.zero_())
    for choices in (8,) if short else (8, None):
        permute.gather_sum(rows, slots, order[:1024], choices)


def activations(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import swiglu

    x = torch.ones(64, 2 * 768, dtype=dtype, requires_grad=True)
    swiglu.swiglu(x, torch.ones(64, requires_grad=True)).sum().backward()
    if not short:
        swiglu.swiglu(x, None).sum().backward()


def losses(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import cross_entropy

    logits = torch.ones(16, 151936, dtype=dtype, requires_grad=True)
    labels = torch.zeros(16, dtype=torch.int64)
    cross_entropy.cross_entropy(logits * 1.0, labels, None).sum().backward()


def choices(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import choice

    for k, width in ((8, 128),) if short else ((8, 128), (1, 8), (8, 512)):
        weights = torch.ones(1024, width, requires_grad=True)
        chosen = choice.highest(weights.detach(), k)
        choice.choices(weights, chosen, k)[1].sum().backward()


def turns(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import rotary

    for size, turned, pairs in (
        ((128, 128, False),) if short else ((128, 128, False), (192, 64, True))
    ):
        x = torch.ones(64, 1, 8, size, dtype=dtype, requires_grad=True)
        rotary.rotary(x, torch.ones(64, 1, 1, turned), pairs=pairs, scale=1.0).sum().backward()


def routes(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import routing
    from pangu.ops.routing import Rule

    logits, bias = torch.ones(1024, 128, requires_grad=True), torch.ones(128)
    for groups, given in ((8, None),) if short else ((8, None), (1, bias)):
        rule = Rule(groups, 8, softmax=given is None, renormalize=True, factor=2.5)
        routing.route(logits, given, rule)[0].sum().backward()


def steps(dtype: torch.dtype) -> None:
    from pangu.ops.adamw import Rule, State, Verdict
    from pangu.ops.kernels import adamw

    rule, one = Rule(1e-3, 0.9, 0.95, 1e-8, 0.1), torch.ones(1)
    main, moment = torch.ones(4096), torch.ones(4096, dtype=dtype)
    for weights in (main.bfloat16(),) if short else (main.bfloat16(), None):
        for part in (slice(None),) if short else (slice(None), slice(1, None)):
            tensors = (main, main, moment, moment, weights)
            state = State(*(each if each is None else each[part] for each in tensors))
            adamw.adamw([state], rule, Verdict(one, one, one))


def fixed(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import fixed_attention, fixed_matmul

    x, w = torch.ones(64, 2048, dtype=dtype), torch.ones(8, 2048, 512, dtype=dtype)
    fixed_matmul.grouped(x, w, torch.full((8,), 8))
    heads = ((8, 128),) if short else ((8, 128), (1, 256))
    for groups, size in heads:
        query, key = torch.ones(5, 8, size, dtype=dtype), torch.ones(300, groups, size, dtype=dtype)
        fixed_attention.attention(query, key, key, 0.1, None)
        if not short:
            fixed_attention.attention(query, key, key, 0.1, torch.ones(5, 300, dtype=torch.bool))


def gradients(dtype: torch.dtype) -> None:
    from pangu.ops.kernels import weight_gradient

    for width in (1536,) if short else (1536, 28672):
        total = torch.zeros(2, 2048, width)
        x, y = torch.ones(64, 2048, dtype=dtype), torch.ones(64, width, dtype=dtype)
        weight_gradient.add_weight_gradient(total, x, y, torch.tensor([40, 24]))


OPERATORS = (activations, norms, permutations, losses, choices, turns, routes, fixed, steps)
OPERATORS += (gradients,)


def main() -> None:
    JITFunction.run = compiled
    backends.select("cpu")
    for dtype in (torch.bfloat16,) if short else (torch.bfloat16, torch.float32):
        for operator in OPERATORS:
            operator(dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
