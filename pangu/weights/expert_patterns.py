"""PreMoe (arXiv 2505.17639): which experts a task needs, by what routers say of the task's text.

A pattern holds a score for every expert of every MoE layer. Patterns of many tasks lie in a folder,
a small safetensors file each.

Shapes: T tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pangu.checkpoint.tensor_files import WeightsError
from pangu.inference.forward import Enough, until_enough
from pangu.inference.likelihood import windows
from pangu.moe.router import ExpertRouter
from pangu.moe.routing import Routing

Score = Literal["peu", "tcess", "frequency", "random"]
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Pattern:
    """A task's scores `[E]`, float32, by the name of the layer (`decoder.layers.3.mlp`): means over
    `tokens` tokens of its text. `router` tells the model: see `fingerprint`."""

    scores: dict[str, torch.Tensor]
    score: Score
    tokens: int
    router: str


class Choices:
    """What one router has chosen: logits and numbers of experts, both `[T, K]`."""

    def __init__(self, functions: Routing) -> None:
        self.functions = functions
        self._logits: list[torch.Tensor] = []
        self._experts: list[torch.Tensor] = []

    def __call__(
        self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route as ever, and remember."""
        weights_TE, chosen_TE = self.functions(logits_TE, bias_E)
        experts_TK = chosen_TE.nonzero()[:, 1].view(len(chosen_TE), -1)
        self._logits.append(logits_TE.detach().gather(1, experts_TK).float().cpu())
        self._experts.append(experts_TK.cpu())
        return weights_TE, chosen_TE

    def scores(self, score: Score, experts: int) -> torch.Tensor:
        """`[E]`, float32: the mean over all tokens."""
        return mean_scores(score, torch.cat(self._logits), torch.cat(self._experts), experts)


def mean_scores(
    score: Score, logits_TK: torch.Tensor, experts_TK: torch.Tensor, experts: int
) -> torch.Tensor:
    """`[E]`, float32: of each token's chosen experts those count whose probability among the chosen
    is no less than r, the mean over tokens of the largest; they count with their logit (TCESS) or
    with max(s, sigmoid(s)) (PEU). Frequency counts choices."""
    if score == "frequency":
        values_TK = torch.ones_like(logits_TK)
    else:
        p_TK = logits_TK.softmax(-1)
        r = p_TK.amax(-1).mean()
        s_TK = logits_TK if score == "tcess" else torch.maximum(logits_TK, logits_TK.sigmoid())
        values_TK = s_TK.masked_fill(p_TK < r, 0.0)
    sums = torch.zeros(experts, dtype=torch.float64)
    sums.index_add_(0, experts_TK.flatten(), values_TK.flatten().double())
    return (sums / len(logits_TK)).float()


def routers(model: torch.nn.Module) -> dict[str, ExpertRouter]:
    """Every router by the name of its layer's MLP, in the model's order."""
    return {
        name.removesuffix(".router"): module
        for name, module in model.named_modules()
        if isinstance(module, ExpertRouter)
    }


@contextlib.contextmanager
def listening(model: torch.nn.Module) -> Iterator[dict[str, Choices]]:
    """What routers choose meanwhile, by the name of the layer."""
    found = {name: Choices(router.functions) for name, router in routers(model).items()}
    for name, router in routers(model).items():
        router.functions = found[name]  # type: ignore[assignment]
    try:
        yield found
    finally:
        for name, router in routers(model).items():
            router.functions = found[name].functions


def run(
    model: GPTModel,
    ids: Sequence[int],
    window: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """All layers over a text in windows of so many tokens; multi-token prediction too."""
    for part in progress(windows(ids, window)):
        rows = torch.tensor([part], device=next(model.parameters()).device)
        positions = torch.arange(rows.size(1), device=rows.device)[None]
        with torch.no_grad():
            model(rows, positions, None, labels=rows.roll(-1, dims=1))


def until_router(model: GPTModel, layer: str, ids: Sequence[int]) -> torch.Tensor:
    """What comes into the router of `layer`, `[T, H]`; nothing behind it is computed."""
    found: list[torch.Tensor] = []

    def stop(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        found.append(args[0].flatten(0, 1))
        raise Enough

    handle = model.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        until_enough(model, torch.tensor([ids]))
    finally:
        handle.remove()
    return found[0]


def random_pattern(like: Mapping[str, int], seed: int, router: str) -> Pattern:
    """Scores drawn evenly, for layers with so many experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(experts, generator=generator) for name, experts in like.items()}
    return Pattern(scores, "random", 0, router)


def mean_pattern(patterns: list[Pattern]) -> Pattern:
    """The generalist: the mean of token-level scores, each task counting as much as any other."""
    first = patterns[0]
    scores = {
        name: torch.stack([pattern.scores[name] for pattern in patterns]).mean(0)
        for name in first.scores
    }
    return Pattern(scores, first.score, sum(p.tokens for p in patterns), first.router)


def fingerprint(router_EH: torch.Tensor) -> str:
    """Of a model: a digest of its first router's weight, whatever dtype it is stored in."""
    return hashlib.sha256(router_EH.cpu().to(torch.bfloat16).float().numpy().tobytes()).hexdigest()


def save(pattern: Pattern, folder: Path, name: str) -> Path:
    """Add a pattern to a store; one of the same name is replaced.

    Raises:
        WeightsError: the folder cannot be written.
    """
    about = {"score": pattern.score, "tokens": str(pattern.tokens), "router": pattern.router}
    path = folder / (name + SUFFIX)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_file(pattern.scores, partial, metadata=about)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be written: {error}") from None
    return path


def read_store(folder: Path, router: str, layers: Mapping[str, int]) -> dict[str, Pattern]:
    """Every pattern of a store by its name, in the order of names.

    Raises:
        WeightsError: there is none, or one cannot be read, or is not of the model whose
            fingerprint and layers (with so many experts) these are.
    """
    files = sorted(folder.glob(f"[!.]*{SUFFIX}"))
    if not files:
        raise WeightsError(f"{folder} holds no patterns")
    found = {path.name.removesuffix(SUFFIX): _read(path) for path in files}
    for name, pattern in found.items():
        shapes = {layer: len(scores) for layer, scores in pattern.scores.items()}
        if pattern.router != router or shapes != dict(layers):
            raise WeightsError(f"{folder / (name + SUFFIX)} is the pattern of another model")
        if pattern.score != (first := next(iter(found.values()))).score:
            raise WeightsError(f"{folder} mixes scores: {first.score} and {pattern.score}")
    return found


def _read(path: Path) -> Pattern:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            scores = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        tokens, score = int(about["tokens"]), about["score"]
        if score not in ("peu", "tcess", "frequency"):
            raise ValueError(f"no patterns are compared by {score!r}")
        if any(s.dim() != 1 or not s.isfinite().all() for s in scores.values()):
            raise ValueError("its scores are not finite numbers, one an expert")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no pattern: {error}") from None
    return Pattern(scores, score, tokens, about.get("router", ""))


def nearest(patterns: Mapping[str, Pattern], layer: str, query_E: torch.Tensor) -> str:
    """TAER: the task whose scores in `layer`, the first with experts, are nearest to those of a
    query (Euclidean)."""
    return min(patterns, key=lambda name: float((patterns[name].scores[layer] - query_E).norm()))
