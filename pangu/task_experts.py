"""A model that holds the experts of one task at a time: the others stay on the disk.

Which experts a task needs is in a store of patterns (`pangu.compress prune-experts --store`). A
prompt's task is found by running it to the first router (PreMoe, arXiv 2505.17639: TAER).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.trained_model import Layout, Trained, loaded, one_process, read_run_config

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from pangu.checkpoint.tensor_rows import TensorRows

AUTO, GENERALIST = "auto", "generalist"


@dataclass(frozen=True)
class TaskChoice:
    """A store of patterns; one of its names, "generalist" for the mean of all, or "auto" for each
    prompt's own; and the part of the experts that is held."""

    patterns: Path
    task: str = AUTO
    keep: float = 0.5


def choice_of(patterns: str, task: str, keep: float) -> TaskChoice | None:
    """Of a command line: None without a store."""
    return TaskChoice(Path(patterns), task, keep) if patterns else None


class TaskExperts:
    """Changes which experts `model` holds. `config` and `rows` are of the whole model; the model's
    own experts and routers are empty until `hold` is called."""

    def __init__(
        self,
        model: GPTModel,
        config: Config,
        rows: TensorRows,
        choice: TaskChoice,
    ) -> None:
        """Raises:
        WeightsError: the store cannot be used, or is of another model.
        """
        from pangu.weights.expert_patterns import fingerprint, read_store, routers
        from pangu.weights.prune_experts import layer_and_part

        self._model, self._config, self._rows, self._choice = model, config, rows, choice
        self._routers = {
            name: rows.read(name)
            for name in rows.names()
            if (place := layer_and_part(name)) and place[1] == "router"
        }
        layers = dict.fromkeys(routers(model), config.model.num_experts)
        self._first = next(iter(layers))
        router = fingerprint(self._routers[f"{self._first}.router.weight"])
        self._patterns = read_store(choice.patterns, router, layers)
        self._kept: dict[str, list[int]] = {}
        self.task = ""
        if choice.task not in (AUTO, GENERALIST, *self._patterns):
            known = ", ".join([AUTO, GENERALIST, *self._patterns])
            raise ConfigError([Violation("task", choice.task, "is not stored", f"one of {known}")])

    @property
    def bytes_read(self) -> int:
        """From the checkpoint so far."""
        return self._rows.bytes_read

    def task_of(self, prompt: Sequence[int]) -> str:
        """The task that was chosen, or the one whose pattern is nearest to a prompt's tokens."""
        if self._choice.task != AUTO:
            return self._choice.task
        from pangu.weights.expert_patterns import nearest

        return nearest(self._patterns, self._first, self._query(prompt))

    def _query(self, prompt: Sequence[int]) -> torch.Tensor:
        """A prompt's scores `[E]` in the first layer with experts, over all of them."""
        import torch

        from pangu.weights.expert_patterns import Choices, routers, until_router

        router = routers(self._model)[self._first]
        hidden_TH = until_router(self._model, self._first, prompt)
        whole = {
            name: tensor.to(hidden_TH.device) for name, tensor in self._router(self._first).items()
        }
        before = router.functions
        choices = Choices(before)
        router.functions = choices  # type: ignore[assignment]
        try:
            with torch.no_grad():
                torch.func.functional_call(router, whole, (hidden_TH[:, None],))
        finally:
            router.functions = before
        score = next(iter(self._patterns.values())).score
        return choices.scores(score, self._config.model.num_experts)

    def _router(self, layer: str) -> dict[str, torch.Tensor]:
        """Everything of a layer's router, for all experts, by its name there."""
        prefix = f"{layer}.router."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._routers.items()
            if name.startswith(prefix)
        }

    def hold(self, task: str) -> None:
        """Read in the experts of a task that the model does not hold yet, in the place of others.

        Raises:
            ConfigError: the checkpoint cannot be read.
        """
        if task == self.task:
            return
        from pangu.checkpoint.tensor_files import WeightsError
        from pangu.weights.expert_patterns import mean_pattern
        from pangu.weights.prune_experts import kept_experts

        stored = self._patterns
        pattern = mean_pattern(list(stored.values())) if task == GENERALIST else stored[task]
        kept = kept_experts(self._config, pattern.scores, self._choice.keep)
        self.task = ""  # until all layers are done
        try:
            for layer, experts in kept.items():
                self._hold(layer, experts)
        except WeightsError as error:
            raise ConfigError([Violation("checkpoint", self._rows.folder, str(error))]) from None
        self.task = task

    def _hold(self, layer: str, experts: list[int]) -> None:
        import torch

        before = self._kept.get(layer, [])
        missing = [expert for expert in experts if expert not in before]
        place = {expert: slot for slot, expert in enumerate([*before, *missing])}
        order = torch.tensor([place[expert] for expert in experts])
        block = self._model.get_submodule(layer)
        with torch.no_grad():
            for name, weight in block.experts.named_parameters():
                held = weight[: len(before)].cpu()
                read = self._rows.rows(f"{layer}.experts.{name}", missing).to(held.dtype)
                weight.copy_(torch.cat([held, read])[order])
            own = block.router.state_dict()
            for name, whole in self._router(layer).items():
                own[name].copy_(whole[torch.tensor(experts)])
        self._kept[layer] = experts


@contextlib.contextmanager
def opened(
    folder: Path, backend: str, choice: TaskChoice | None, layout: Layout | None = None
) -> Iterator[tuple[Trained, TaskExperts | None]]:
    """A whole model, or this rank's part of it in a layout; or with a choice one that has room for
    some of its experts, and what fills it.

    Raises:
        ConfigError: the backend is missing, the model or the patterns cannot be used.
    """
    if choice is None:
        with loaded(folder, backend, layout=layout) as trained:
            yield trained, None
        return
    config = read_run_config(folder)
    with one_process(config, backend):
        yield _without_experts(folder, config, choice)


def _without_experts(
    folder: Path, config: Config, choice: TaskChoice
) -> tuple[Trained, TaskExperts]:
    from pangu.checkpoint import contents, restore
    from pangu.checkpoint.tensor_files import WeightsError
    from pangu.data import DataError
    from pangu.data.tokenizer import load_tokenizer
    from pangu.model.build import build_model
    from pangu.weights.prune_experts import layer_and_part, pruned_config

    try:
        smaller = pruned_config(config, choice.keep)
        path, rows = restore.unread(folder)
        chunks, _ = build_model(smaller)
        contents.load_rows(rows, chunks, lambda name: layer_and_part(name) is None)
        experts = TaskExperts(chunks[0].eval(), config, rows, choice)
        tokenizer = load_tokenizer(path / restore.TOKENIZER)
    except WeightsError as error:
        raise ConfigError([Violation("patterns", choice.patterns, str(error))]) from None
    except DataError as error:
        raise ConfigError([Violation("checkpoint", folder, str(error))]) from None
    return Trained(chunks[0], tokenizer, smaller), experts
