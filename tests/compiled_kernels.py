"""`python -m tests.compiled_kernels`: every kernel for a Hopper GPU, without one.

Operators run on CPU tensors; where they would launch a kernel it is compiled instead, down to the
machine's code, for the very arguments it was given. A line of JSON for each kernel: what it takes
of the machine.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / ".triton"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
found: dict[str, dict[str, int]] = {}


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
    found[name] = {"shared": built.metadata.shared, "warps": built.metadata.num_warps}


def main() -> None:
    JITFunction.run = compiled
    from pangu.ops.kernels import swiglu

    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(64, 2 * 768, dtype=dtype, requires_grad=True)
        weights = torch.ones(64, requires_grad=True)
        swiglu.swiglu(x, weights).sum().backward()
        swiglu.swiglu(x, None).sum().backward()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
