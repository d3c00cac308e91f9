"""Everything about speed on one GPU, prepared so that one call of a few minutes measures it:

    python benchmarks/gpu.py [--only operators|layers|steps] [--output FILE.json]

1. every operator as the backend runs it against its float64 reference (`pangu.ops.cases`);
2. every operator that has a fused form beside its plain one, forward and backward, at the sizes
   of Qwen3-30B, each under balanced, Zipf and one-hot routing where rows belong to experts;
3. the MoE layer at four published shapes, on kernels and on plain operators, beside transformers';
4. training steps of three models, on kernels and on plain operators, by kind of kernel.

A table on stdout and, with --output, JSON; it ends with 1 where an operator differs, and without a
GPU with 2 and a sentence. `--rehearse` runs all of it on a CPU in tiny sizes, kernels in Triton's
interpreter, so that nothing breaks on the day; its times mean nothing. Not run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_steps import show

ROOT = Path(__file__).parents[1]
ZIPF = 1.2
ROUTINGS = ("balanced", "Zipf", "one-hot")


@dataclass(frozen=True)
class Sizes:
    """Of the operators' inputs, of layers, and how long each is run."""

    tokens: int = 32_768
    hidden: int = 2048
    width: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    head_size: int = 128
    vocabulary: int = 151_936
    logit_rows: int = 8192
    seconds: float = 0.2
    least: int = 3


TINY = Sizes(24, 32, 16, 8, 2, 2, 8, 50, 6, 0.0, 1)
LAYERS = {  # hidden, width, experts, top-k, tokens
    "Qwen3-30B": (2048, 768, 128, 8, (8192, 32_768)),
    "Mixtral": (4096, 14_336, 8, 2, (8192,)),
    "Pangu Pro": (5120, 1344, 64, 8, (8192, 32_768)),
    "Pangu Ultra, 64 experts": (7680, 2048, 64, 8, (8192,)),
}
TINY_LAYERS = {"tiny": (32, 16, 8, 2, (24,))}


def refuse() -> int:
    print("error: benchmarks/gpu.py needs an NVIDIA GPU, torch sees none", file=sys.stderr)
    return 2


def milliseconds(run: Callable[[], Any], seconds: float, least: int = 1) -> float:
    """Median of a call's time on the device, after as many as `least` that are not counted."""
    import torch

    from pangu import backends

    for _ in range(least):
        run()
    backend, found, start = backends.current(), [], time.perf_counter()
    while len(found) < least or (time.perf_counter() - start < seconds and len(found) < 200):
        if backend.asynchronous:
            begun, over = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            run()
            over.record()
            over.synchronize()
            found.append(begun.elapsed_time(over))
        else:
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def peak_gib(run: Callable[[], Any]) -> float:
    """Device memory that a call holds at once, beyond what is held before it."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def both_ways(function: Callable[..., Any], *inputs: Any) -> Callable[[], None]:
    """Forward and backward; `inputs` that are floating-point get a gradient."""
    import torch

    leaves = [each for each in inputs if each.requires_grad]
    upstream = torch.ones_like(function(*inputs))

    def run() -> None:
        torch.autograd.grad(function(*inputs), leaves, upstream)

    return run


def chosen_experts(routing: str, sizes: Sizes) -> Any:
    """Distinct experts of each token, `[T, K]`, ascending."""
    import torch

    shape, device = (sizes.tokens, sizes.top_k), _device()
    if routing == "one-hot":
        return torch.arange(sizes.top_k, device=device).expand(shape)
    power = ZIPF if routing == "Zipf" else 0.0
    popularity = torch.arange(1.0, sizes.experts + 1, device=device) ** -power
    drawn = torch.multinomial(popularity.expand(sizes.tokens, -1), sizes.top_k)
    return drawn.sort(dim=1).values


def _device() -> Any:
    from pangu import backends

    return backends.current().device


def updates(s: Sizes, randn: Callable[..., Any]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Of experts' weights, from main copies in float32 to 16 bits."""
    import torch

    from pangu.ops.adamw import Rule, State, Verdict, adamw

    rule, ones = Rule(1e-4, 0.9, 0.95, 1e-8, 0.1), torch.ones(1, device=_device())
    verdict = Verdict(ones, ones, ones - 1)
    shape = (s.experts, s.hidden, 2 * s.width)
    for kind in (torch.float32, torch.bfloat16):
        main, gradient = (randn(*shape, kind=torch.float32).detach() for _ in range(2))
        moments = [torch.zeros_like(main, dtype=kind) for _ in range(2)]
        states = [State(main, gradient, *moments, main.to(torch.bfloat16))]
        what = f"{main.numel()}, moments in {kind}"
        yield "adamw", what, lambda states=states: adamw(states, rule, verdict)


def losses(s: Sizes, randn: Callable[..., Any]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Of logits, and of hidden states."""
    import torch

    from pangu.ops.cross_entropy import cross_entropy
    from pangu.ops.linear_cross_entropy import linear_cross_entropy

    logits = randn(s.logit_rows, s.vocabulary)
    labels = torch.zeros(s.logit_rows, dtype=torch.int64, device=_device())
    lost = both_ways(lambda x: cross_entropy(x * 1.0, labels), logits)
    yield "cross_entropy", f"{s.logit_rows} × {s.vocabulary}, with a copy", lost
    states, head = randn(s.logit_rows, s.hidden), randn(s.vocabulary, s.hidden)
    ones = torch.ones(s.logit_rows, device=_device())
    whole = both_ways(lambda x, w: linear_cross_entropy(x, w, labels, ones), states, head)
    yield "linear_cross_entropy", f"{s.logit_rows} × {s.hidden} × {s.vocabulary}", whole


def operators(sizes: Sizes) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(operator, what, call) of everything that has a kernel."""
    import torch

    from configs.schema import MoEConfig
    from pangu.moe.routing import routing_for
    from pangu.ops import choice, permute, rms_norm, rotary, swiglu

    s, dtype = sizes, torch.bfloat16

    def randn(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=kind, device=_device()).requires_grad_()

    rows = s.tokens * s.top_k
    gates, weights = randn(rows, 2 * s.width), randn(rows, kind=torch.float32)
    yield "swiglu", f"{rows} × {s.width}", both_ways(swiglu.swiglu, gates, weights)
    for width, count in ((s.hidden, s.tokens), (s.head_size, s.tokens * s.heads)):
        x, gain = randn(count, width), randn(width)
        norm = both_ways(lambda x, gain: rms_norm.rms_norm(x, gain, 1e-6), x, gain)
        yield "rms_norm", f"{count} × {width}", norm
    heads, angles = randn(s.tokens, 1, s.heads, s.head_size), randn(s.tokens, 1, 1, s.head_size)
    turned = both_ways(lambda x: rotary.rotary(x, angles.detach().float()), heads)
    yield "rotary", f"{s.tokens} × {s.heads} × {s.head_size}", turned
    yield from losses(s, randn)
    yield from updates(s, randn)
    scores = randn(s.tokens, s.experts, kind=torch.float32)
    for router in ("moge", "top_k"):
        route = routing_for(MoEConfig(router=router, num_expert_groups=s.top_k, top_k=s.top_k))
        yield "routing", router, both_ways(lambda x, route=route: route(x)[0], scores)
    grouped = scores.detach().unflatten(1, (s.top_k, -1))
    yield "choice", "MoGE", lambda: choice.highest(grouped, 1)
    yield "choice", "top-k", lambda: choice.highest(scores.detach(), s.top_k)
    chosen = choice.highest(scores.detach(), s.top_k)
    listed = both_ways(lambda x: choice.choices(x, chosen, s.top_k)[1], scores)
    yield "choice", "the list", listed
    tokens, back = randn(s.tokens, s.hidden), randn(rows, s.hidden)
    for routing in ROUTINGS:
        experts = chosen_experts(routing, s)
        yield "permute", f"sort, {routing}", lambda e=experts: permute.plan(e, s.experts)
        plan = permute.plan(experts, s.experts)
        there = both_ways(lambda x, p=plan: permute.permute(x, p), tokens)
        yield "permute", f"to experts, {routing}", there
        yield (
            "permute",
            f"back, {routing}",
            both_ways(lambda x, p=plan: permute.unpermute(x, p), back),
        )
        gathered = _weight_gradient(tokens, plan, s)
        yield "weight_gradient", f"{s.experts} × {s.hidden} × {2 * s.width}, {routing}", gathered


def _weight_gradient(tokens_TH: Any, plan: Any, sizes: Sizes) -> Callable[[], None]:
    """Of the experts' first product, into float32."""
    import torch

    from pangu.ops import grouped_matmul, permute

    shape = (sizes.experts, sizes.hidden, 2 * sizes.width)
    weight = torch.zeros(shape, dtype=tokens_TH.dtype, device=_device()).requires_grad_()
    weight.main_grad = torch.zeros(shape, device=_device())
    x_NH = permute.permute(tokens_TH.detach(), plan)
    y_NO = x_NH.new_ones(x_NH.size(0), shape[2])

    def run() -> None:
        weight.grad_added_to_main_grad = False
        # The gradient alone: none of the rows is asked for, and the product is a part of both.
        product = grouped_matmul.grouped_matmul(x_NH, weight, plan.counts_E, parameter=weight)
        product.backward(y_NO)
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    return run


def measured_operators(sizes: Sizes) -> list[dict[str, Any]]:
    """Each on its kernel and in its plain form."""
    from pangu import backends

    ours, found = backends.current().operators, {}
    plain = plain_forms()
    for name, variants in (("kernel", ours), ("plain", plain)):
        backends.use(variants)
        for operator, what, run in operators(sizes):
            row = found.setdefault((operator, what), {"operator": operator, "what": what})
            row[name] = milliseconds(run, sizes.seconds, sizes.least)
            row[f"{name} GiB"] = peak_gib(run)
    backends.use(ours)
    return list(found.values())


def plain_forms() -> Any:
    """What this process would run without our kernels, and with all logits at once."""
    from pangu import backends
    from pangu.backends import cpu, cuda

    forms = cuda.PLAIN if backends.current().asynchronous else cpu.create(0).operators
    return replace(forms, linear_cross_entropy="plain")


def measured_layers(shapes: dict[str, tuple], sizes: Sizes) -> list[dict[str, Any]]:
    """The MoE layer forward and backward: milliseconds and GiB, floor at 800 TFLOPS."""
    import torch
    from moe_layer import Shape, ours, transformers_block

    from pangu import backends

    kernels, found = backends.current().operators, []
    plain = plain_forms()
    dtype = torch.bfloat16 if backends.current().asynchronous else torch.float32
    for name, (hidden, width, experts, top_k, all_tokens) in shapes.items():
        for tokens in all_tokens:
            shape = Shape(tokens, hidden, width, experts, top_k)
            x = torch.randn(tokens, 1, hidden, dtype=dtype, device=_device()).requires_grad_()
            row: dict[str, Any] = {"shape": name, "tokens": tokens}
            row["floor"] = 18 * tokens * top_k * hidden * width / 800e12 * 1e3
            makers: dict[str, Callable[[], Any]] = {
                f"{router}, {routing}": lambda s=shape, r=router, k=routing: skewed(ours(s, r), k)
                for router in ("moge", "top_k")
                for routing in (ROUTINGS if router == "top_k" else ROUTINGS[:1])
            }
            if backends.current().asynchronous:  # in a rehearsal its import alone takes seconds
                makers["transformers"] = lambda s=shape: transformers_block(s, "grouped_mm")
            for label, make in makers.items():
                for kind, variants in (("", kernels), (", plain", plain)):
                    if label == "transformers" and kind:
                        continue
                    backends.use(variants)
                    row[label + kind] = _layer(make().to(_device(), dtype), x, sizes)
            backends.use(kernels)
            found.append(row)
    return found


def _layer(layer: Any, x: Any, sizes: Sizes) -> dict[str, float]:
    from moe_layer import step

    run = step(layer, x)
    run()
    return {"ms": milliseconds(run, sizes.seconds, sizes.least), "GiB": peak_gib(run)}


def skewed(layer: Any, routing: str) -> Any:
    """The layer, with an advantage of some experts in what it chooses by."""
    import torch

    if routing != "balanced":
        base, experts = layer.router.functions, layer.router.num_experts
        order = torch.arange(experts, dtype=torch.float32, device=_device())
        ahead = -ZIPF * (order + 1).log() if routing == "Zipf" else -1e3 * order
        layer.router.functions = lambda logits, bias=None: base(logits + ahead, bias)
    return layer


def checks() -> list[dict[str, Any]]:
    """Every operator against its reference."""
    from pangu.ops.cases import TOLERANCES, cases, compared

    outcomes = [compared(case, dtype) for case in cases() for dtype in TOLERANCES]
    return [
        {
            "operator": o.name,
            "dtype": str(o.dtype),
            "error": o.error,
            "holds": o.holds,
            "why": o.raised,
        }
        for o in outcomes
    ]


def table(found: dict[str, Any]) -> None:
    for row in found.get("checks", []):
        if not row["holds"]:
            print(f"DIFFERS: {row['operator']} in {row['dtype']}: {row['why'] or row['error']}")
    for row in found.get("operators", []):
        ratio = row["plain"] / row["kernel"]
        name = f"{row['operator']}, {row['what']}"
        held = f"{row['plain GiB']:5.2f} → {row['kernel GiB']:5.2f} GiB"
        print(f"{name:48} {row['plain']:8.3f} → {row['kernel']:8.3f} ms {ratio:5.2f} ×  {held}")
    for row in found.get("layers", []):
        print(f"{row['shape']}, {row['tokens']} tokens: floor {row['floor']:.1f} ms")
        for label, value in row.items():
            if isinstance(value, dict):
                print(f"    {label:32} {value['ms']:8.2f} ms {value['GiB']:6.2f} GiB")

    show(found.get("steps", []))


def _groups() -> None:
    """Process groups of this process alone."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from pangu import backends

    store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
    library = backends.current().collective_library
    dist.init_process_group(library, rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("operators", "layers", "steps"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.append(str(ROOT / ".triton"))
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        return refuse()
    from gpu_steps import BATCH, MODELS, TINY_BATCH, TINY_MODELS, measured_steps

    from pangu import backends
    from pangu.backends import cuda
    from pangu.engines.megatron.fitting import select_backend

    start = time.perf_counter()
    backend = select_backend("cpu" if given.rehearse else "cuda", try_kernels=False)
    if given.rehearse:
        backends.use(replace(cuda.OURS, grouped_matmul="loop"))
    _groups()
    sizes = TINY if given.rehearse else Sizes()
    found: dict[str, Any] = {"device": backend.description, "torch": torch.__version__}
    found["checks"] = checks()
    if given.only in (None, "operators"):
        found["operators"] = measured_operators(sizes)
    if given.only in (None, "layers"):
        found["layers"] = measured_layers(TINY_LAYERS if given.rehearse else LAYERS, sizes)
    if given.only in (None, "steps"):
        models = (TINY_MODELS, TINY_BATCH) if given.rehearse else (MODELS, BATCH)
        found["steps"] = measured_steps(*models)
    found["seconds"] = time.perf_counter() - start
    table(found)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))
    return 0 if all(row["holds"] for row in found["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
