"""What the decoding engine takes around its operators on a CPU: steps of models so narrow that
nothing else is left, with and without experts, at two depths, for few sequences and many, with one
new token of each or several. In a process of its own:

    python -m pangu.calibration.decoding backend=cpu backend.threads=1
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from launch.environment import ProcessEnvironment

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from configs.schema import Config
    from pangu.inference.engine import Engine
    from simulator.api import Decoding

DEPTHS = (2, 6)
SEQUENCES = (1, 8, 32)
SEVERAL = 4  # tokens
ROUNDS, QUICK_ROUNDS = 30, 6
PROMPT = 8
ROUTED = "model.shared_expert_ffn_hidden_size=0"
KINDS: tuple[list[str], ...] = (
    ["model.num_experts=0", "model.ffn_hidden_size=16", ROUTED],
    [ROUTED],
    [],
)


class Point(NamedTuple):
    """A step: layers, those of them that have experts and a shared one, sequences, tokens of each,
    experts that had tokens in a layer, and seconds."""

    layers: int
    expert_layers: int
    shared_layers: int
    sequences: int
    tokens: int
    experts: float
    seconds: float


def measure(backend: list[str], quick: bool, say: Callable[[str], None]) -> Decoding | None:
    """The costs that explain such steps; None where they hide behind a device.

    `backend`: overrides.

    Raises:
        RuntimeError: the process failed; the message is the last line that it said.
    """
    say("decoding")
    command = [sys.executable, "-m", "pangu.calibration.decoding", *backend]
    done = subprocess.run(
        [*command, *["--quick"][: int(quick)]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise RuntimeError(f"decoding failed with exit code {done.returncode}: {said[-1]}")
    points = [Point(*row) for row in json.loads(done.stdout)]
    return explain(points) if points else None


def explain(points: Sequence[Point]) -> Decoding:
    """Least squares of relative errors; nothing costs less than 0."""
    import numpy as np

    from simulator.api import Decoding

    table = np.array(points, dtype=float)
    layers, expert_layers, shared_layers, sequences, tokens, experts, seconds = table.T
    several = tokens > 1
    columns = [
        np.ones_like(seconds),
        sequences,
        layers,
        expert_layers,
        shared_layers,
        layers * sequences * ~several,
        layers * sequences * several,
        expert_layers * experts,
    ]
    matrix = np.stack(columns, axis=1) / seconds[:, None]
    kept = list(range(len(columns)))
    while True:  # without what would cost less than nothing
        found, *_ = np.linalg.lstsq(matrix[:, kept], np.ones_like(seconds), rcond=None)
        if not (found < 0).any():
            break
        kept.pop(int(found.argmin()))
    costs = np.zeros(len(columns))
    costs[kept] = found * 1e6
    return Decoding(*map(float, costs))


def points(overrides: list[str], rounds: int) -> Iterator[Point]:
    """Median processor seconds of each kind of step, in this process; none of a device that works
    behind its host."""
    from configs.compose import load
    from pangu.calibration.framework import NARROW
    from pangu.local_launch import prepare_environment

    config = load([*NARROW, *overrides])
    prepare_environment(config, ProcessEnvironment())
    import torch

    from pangu.engines.megatron import process_groups
    from pangu.engines.megatron.fitting import select_backend

    if select_backend(config.backend.name).asynchronous:
        return
    torch.set_num_threads(config.backend.threads or 1)
    process_groups.initialize(config)
    try:
        for kind in KINDS:
            for depth in DEPTHS:
                yield from _of_model(
                    load([*NARROW, *overrides, *kind, f"model.num_layers={depth}"]), rounds
                )
    finally:
        process_groups.shutdown()


def _of_model(config: Config, rounds: int) -> Iterator[Point]:
    from pangu.inference.touched_experts import TouchedExperts
    from pangu.model.build import build_model

    model = build_model(config)[0][0].eval()
    kinds = list(itertools.product(SEQUENCES, (1, SEVERAL)))
    engines = [_decoding(model, config, sequences, tokens, rounds) for sequences, tokens in kinds]
    seconds = [_median_step(engine, rounds) for engine in engines]
    touched = TouchedExperts(model)  # which costs a little, once all is timed
    layers = config.model.num_layers
    with_experts = layers if config.model.num_experts else 0
    with_shared = with_experts if config.model.shared_expert_ffn_hidden_size else 0
    depth = (layers, with_experts, with_shared)
    for (sequences, tokens), engine, each in zip(kinds, engines, seconds, strict=True):
        engine.step()
        yield Point(*depth, sequences, tokens, touched.take() or 0.0, each)


def _median_step(engine: Engine, rounds: int) -> float:
    """Processor seconds."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        engine.step()
        found.append(time.process_time() - started)
    return statistics.median(found)


def _decoding(model: GPTModel, config: Config, sequences: int, tokens: int, rounds: int) -> Engine:
    """An engine whose sequences all decode, and verify `tokens` - 1 wrong guesses each."""
    from pangu.inference import batching
    from pangu.inference.engine import Engine
    from pangu.inference.sampling import Sampling
    from pangu.inference.speculative import Draft, Drafter

    never = config.model.vocab_size - 1  # a token that is not drawn

    class Wrong(Drafter):
        draws = False

        def propose(self, counts: dict[batching.Sequence, int]) -> dict[batching.Sequence, Draft]:
            return {sequence: Draft([never] * count) for sequence, count in counts.items()}

    new = rounds + 2 * SEVERAL
    room = sequences * (PROMPT + new + 32)
    engine = Engine(model, vocab_size=never, cache_tokens=room, max_sequences=sequences)
    if tokens > 1:
        engine.drafter, engine.draft_tokens = Wrong(), tokens - 1
    for first in range(sequences):
        prompt = tuple(range(first, first + PROMPT))
        engine.add(batching.Request(prompt, new, Sampling(temperature=0)))
    engine.step()  # the prompts
    engine.step()
    return engine


def main() -> None:
    """Print the points as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("overrides", nargs="*", metavar="backend=…")
    options.add_argument("--quick", action="store_true", help="few rounds")
    given = options.parse_args()
    rounds = QUICK_ROUNDS if given.quick else ROUNDS
    print(json.dumps(list(points(given.overrides, rounds))))


if __name__ == "__main__":
    main()
