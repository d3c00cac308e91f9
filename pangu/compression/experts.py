"""Pruning experts from end to end: listen to the routers, choose, write, judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.violation import ConfigError, Violation
from pangu.compression.texts import (
    MODEL,
    Progress,
    Row,
    Texts,
    judge,
    new_model,
    refuse_broken,
    table,
)
from pangu.task_experts import AUTO, GENERALIST
from pangu.trained_model import Trained, loaded, read_run_config

if TYPE_CHECKING:
    import torch

    from pangu.weights.expert_patterns import Pattern, Score


@dataclass(frozen=True)
class Choice:
    """The part of the experts that stays, and by what they are ranked; `seed` is of random
    scores."""

    keep: float
    score: Score = "peu"
    seed: int = 0


def prune(
    folder: Path,
    out: Path | None,
    store: Path | None,
    choice: Choice,
    tasks: list[Texts],
    *,
    backend: str,
    progress: Progress,
) -> str:
    """Write the model of `folder` with fewer experts at `out`, and add the patterns of the tasks to
    `store`; returns a table of both models.

    Raises:
        ConfigError: the model or a text cannot be used, or `out` exists.
        WeightsError: too few experts would be left, a weight is not finite, or a folder cannot be
            written; nothing is left at `out`.
    """
    _refuse(store, choice, tasks)
    from pangu.weights.prune_experts import experts_left

    experts_left(read_run_config(folder), 1.0 if out is None else choice.keep)
    listen = partial(_listen, folder, store, choice, tasks, backend=backend, progress=progress)
    if out is None:
        listen(judged=False)
        return f"{', '.join(map(_name, tasks))}: added to {store}"
    with new_model(out) as work:
        before, scores = listen(judged=True)
        write(folder, work / MODEL, scores, choice.keep)
        with loaded(work / MODEL, backend) as trained:
            name = f"{choice.score}, {trained.config.model.num_experts} experts"
            after = [judge(name, trained, texts, progress) for texts in _judges(tasks)]
    rows = zip(before, after, _judges(tasks), strict=True)
    return "\n".join(table([one, other], texts) for one, other, texts in rows)


def _listen(
    folder: Path,
    store: Path | None,
    choice: Choice,
    tasks: list[Texts],
    *,
    judged: bool,
    backend: str,
    progress: Progress,
) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Rows of the whole model where it is to be `judged`, and the scores of all tasks by layer. The
    model is gone afterwards."""
    with loaded(folder, backend) as trained:
        from pangu.weights import expert_patterns

        refuse_broken(trained.model, folder)
        patterns = [measured(trained, choice, texts, progress) for texts in tasks]
        if store is not None:
            for texts, pattern in zip(tasks, patterns, strict=True):
                expert_patterns.save(pattern, store, _name(texts))
        judges = _judges(tasks) if judged else []
        rows = [judge("before", trained, texts, progress) for texts in judges]
        return rows, expert_patterns.mean_pattern(patterns).scores


def _name(texts: Texts) -> str:
    return texts.calibration.stem


def _refuse(store: Path | None, choice: Choice, tasks: list[Texts]) -> None:
    """Raises:
    ConfigError: a task cannot be read, two have one name, or there is nothing to store.
    """
    for texts in tasks:
        texts.check()
    name, count = Counter(map(_name, tasks)).most_common(1)[0]
    if count > 1:
        raise ConfigError([Violation("--task", name, "is the name of two files")])
    if store is not None and (taken := {AUTO, GENERALIST} & {_name(texts) for texts in tasks}):
        reason = "has a meaning of its own where tasks are named"
        raise ConfigError([Violation("--task", taken.pop(), reason)])
    if store is not None and choice.score == "random":
        reason = "random scores tell no task from another"
        raise ConfigError([Violation("--store", store, reason)])


def _judges(tasks: list[Texts]) -> list[Texts]:
    """Each task by its own text, or all by the one that was given."""
    return tasks if tasks[0].judged_by is None else tasks[:1]


def measured(trained: Trained, choice: Choice, texts: Texts, progress: Progress) -> Pattern:
    """The pattern of a task."""
    from pangu.weights import expert_patterns

    layers = expert_patterns.routers(trained.model)
    experts = trained.config.model.num_experts
    router = expert_patterns.fingerprint(next(iter(layers.values())).weight.detach())
    if choice.score == "random":
        return expert_patterns.random_pattern(dict.fromkeys(layers, experts), choice.seed, router)
    ids = texts.calibration_ids(trained.tokenizer)
    with expert_patterns.listening(trained.model) as choices:
        expert_patterns.run(trained.model, ids, texts.window_of(trained.config), progress)
    scores = {name: found.scores(choice.score, experts) for name, found in choices.items()}
    return expert_patterns.Pattern(scores, choice.score, len(ids), router)


def write(folder: Path, out: Path, scores: dict[str, torch.Tensor], keep: float) -> None:
    """Write the model of `folder` with the experts of the highest scores, by layer."""
    from pangu.weights import model_folder, prune_experts, quantized_file
    from pangu.weights.prune_experts import pruned

    path, config, source = model_folder.opened(folder)
    kept = prune_experts.kept_experts(config, scores, keep)
    tensors = prune_experts.pruned_tensors(source, kept)

    def grids(target: Path) -> None:
        quantized_file.copy(path, target, lambda name, grid: (name, pruned(name, grid, kept)))

    after = prune_experts.pruned_config(config, keep)
    model_folder.write(out, after, tensors, made_of=path, beside=grids)
