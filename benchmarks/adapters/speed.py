"""The layouts on which evaluations per second are counted, and ours."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from configs.schema import Config, MemoryConfig
from simulator.evaluate import evaluate
from simulator.layout import Layout, from_config
from simulator.predict import predict
from simulator.validation.engine import case
from simulator.validation.table import read_table

LAYOUTS, SECONDS = 1000, 20.0  # of the sweep, and what everybody gets for it


def sweep() -> list[Config]:
    """Layouts of GPT-3 175B on 1,536 devices that all have words for, in a fixed random order."""
    base = next(case(row).config for row in read_table() if row["id"] == "korth_4")
    base = replace(base, devices=1536)
    found = []
    policies = [MemoryConfig(kind) for kind in ("none", "selective", "full")]
    stages = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96)
    for tp, pp, micro, memory, zero in itertools.product(
        (1, 2, 4, 8), stages, (1, 2, 4, 8), policies, (0, 1)
    ):
        if (tp * pp) % micro:
            continue
        parallel = replace(
            base.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=1,
            zero_stage=zero,
        )
        train = replace(base.train, micro_batch_size=micro, global_batch_size=1536)
        found.append(replace(base, parallel=parallel, train=train, memory=memory))
    random.Random(0).shuffle(found)
    return found[:LAYOUTS]


def one_at_a_time(work: Callable[[Config], Any], configs: Sequence[Config]) -> tuple[int, float]:
    """How many were done in the time that everybody gets, and the seconds; a first one, which
    fills caches, is not timed."""
    work(configs[0])
    start = time.perf_counter()
    done, seconds = 0, 0.0
    while done < len(configs) and seconds < SECONDS:
        work(configs[done])
        done, seconds = done + 1, time.perf_counter() - start
    return done, seconds


def as_arrays(configs: Sequence[Config]) -> Layout:
    """The layouts of all configurations in one."""
    layouts = [from_config(config) for config in configs]
    columns: dict[str, Any] = {}
    for item in fields(Layout):
        values = [getattr(layout, item.name) for layout in layouts]
        if item.name != "stage_layers":
            kind = bool if isinstance(values[0], bool) else float
            columns[item.name] = np.array(values, dtype=kind)
    return Layout(**columns)


def at_once(configs: Sequence[Config]) -> tuple[int, float]:
    """The sweep as arrays, again and again: layouts and seconds; the first time is not timed."""
    layouts = as_arrays(configs)
    evaluate(configs[0], layouts)
    done, seconds = 0, 0.0
    start = time.perf_counter()
    while seconds < SECONDS / 10:
        evaluate(configs[0], layouts)
        done, seconds = done + len(configs), time.perf_counter() - start
    return done, seconds


def our_speeds(configs: list[Config]) -> dict[str, tuple[int, float]]:
    """Evaluations and seconds, by way of evaluating."""
    return {
        "ours, all layouts as arrays (search)": at_once(configs),
        "ours, one layout at a time": one_at_a_time(lambda c: evaluate(c, from_config(c)), configs),
        "ours, one at a time with its timeline (predict)": one_at_a_time(predict, configs),
    }
