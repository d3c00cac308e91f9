"""A trained model in this process alone or in those of a launcher, whatever layout it was saved in.
No torch before it is loaded: a mistake answers at once."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from configs.compose import read_file
from configs.layout_rules import ranks, widths
from configs.schema import BackendConfig, Config, LaunchConfig, MemoryConfig, ParallelConfig
from configs.violation import ConfigError, Violation
from launch.environment import ProcessEnvironment
from pangu.local_launch import prepare_environment

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from pangu.data.tokenizer import Tokenizer
    from pangu.inference.engine import Engine


@dataclass(frozen=True)
class Layout:
    """Over the processes of a launcher, of which `process` is this one: tensor-parallel groups are
    replicas, and experts lie on `expert_parallel` ranks."""

    process: ProcessEnvironment
    tensor_parallel: int = 1
    expert_parallel: int = 1
    timeout_minutes: float = 10.0

    def of(self, config: Config) -> Config:
        """`config` in this layout.

        Raises:
            ConfigError: the model does not split so, or there are other numbers of processes.
        """
        world, local = self.process.world_size, self.process.local_world_size
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.tensor_parallel,
            sequence_parallel=config.model.num_experts > 0,  # as experts want it
            expert_model_parallel_size=self.expert_parallel,
        )
        launch = LaunchConfig(
            processes=local, nodes=world // local, timeout_minutes=self.timeout_minutes
        )
        laid_out = replace(config, parallel=parallel, launch=launch)
        problems = [*ranks(laid_out), *widths(laid_out)]
        if problems:
            name, option = self.process.count_is_set_by()
            if not self.process.launched:
                option = "torchrun --nproc_per_node"
            raise ConfigError(
                [
                    Violation(name, world, problem.reason, f"set it with {option}")
                    if problem.key.startswith("launch.")
                    else Violation(problem.key, problem.value, problem.reason)
                    for problem in problems
                ]
            )
        return laid_out


class Trained(NamedTuple):
    """A whole model on this process, the tokenizer it was trained with, and its configuration."""

    model: GPTModel
    tokenizer: Tokenizer
    config: Config


def read_run_config(folder: Path) -> Config:
    """The configuration saved in a run or checkpoint folder, laid out for one process.

    Raises:
        ConfigError: there is none, or it is not one of this version.
    """
    file, reason = folder / "config.yaml", ""
    try:
        if not file.is_file():
            reason = "is neither a run folder nor a checkpoint: it has no config.yaml"
    except OSError as error:  # a folder of others', a name that is too long
        reason = f"cannot be looked into: {error.strerror}"
    if reason:
        raise ConfigError([Violation("checkpoint", folder, reason)])
    config = read_file(file, "checkpoint")
    return replace(
        config,
        parallel=ParallelConfig(),
        memory=MemoryConfig(),
        launch=LaunchConfig(),
        moe=replace(config.moe, dispatcher="auto"),
        backend=BackendConfig(),
        devices=None,
        run_dir=str(folder),
    )


@contextlib.contextmanager
def loaded(
    folder: Path,
    backend: str = "auto",
    *,
    input_transforms: bool = False,
    layout: Layout | None = None,
) -> Iterator[Trained]:
    """The model of a run, a checkpoint or an imported folder, with its tokenizer; with
    `input_transforms` it has those, which do nothing yet, though it was saved without. With
    `layout`, this rank's part of it.

    Raises:
        ConfigError: the backend is missing, or the checkpoint cannot be used.
    """
    config = read_run_config(folder)
    if input_transforms:
        config = replace(config, model=replace(config.model, input_transforms=True))
    config = layout.of(config) if layout else config
    with processes(config, backend, layout.process if layout else ProcessEnvironment()):
        yield Trained(*load_for_inference(config, folder), config)


@contextlib.contextmanager
def one_process(config: Config, backend: str) -> Iterator[None]:
    """Everything that a model of `config` needs before it can be built in this process.

    Raises:
        ConfigError: the backend is unknown or missing.
    """
    with processes(config, backend, ProcessEnvironment()):
        yield


@contextlib.contextmanager
def processes(config: Config, backend: str, process: ProcessEnvironment) -> Iterator[None]:
    """The same in several, of which `process` is this one.

    Raises:
        ConfigError: the backend is missing.
    """
    warnings.filterwarnings("ignore", module="megatron|torch")  # their own deprecations
    prepare_environment(config, process)
    from pangu.backends import BackendName
    from pangu.engines.megatron.fitting import select_backend

    known = ("auto", *get_args(BackendName))
    if backend not in known:
        raise ConfigError([Violation("backend", backend, f"is none of {', '.join(known)}")])
    try:
        select_backend(backend)
    except RuntimeError as error:
        raise ConfigError([Violation("backend", backend, str(error))]) from None
    from pangu.engines.megatron import process_groups

    process_groups.initialize(config)
    try:
        yield
    finally:
        process_groups.shutdown()


def load_for_inference(config: Config, folder: Path) -> tuple[GPTModel, Tokenizer]:
    """Model and tokenizer of a run folder's newest sound checkpoint, or of a checkpoint folder.

    Collective. `config` describes the model and the layout to load it into.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it does not fit the model.
    """
    from pangu.checkpoint import manifest, restore
    from pangu.data import DataError
    from pangu.data.tokenizer import load_tokenizer
    from pangu.model.build import build_model

    source: Path | restore.Found = folder
    if not (folder / manifest.MANIFEST).is_file():  # a run's folder, not a checkpoint's
        try:
            found = restore.newest(str(folder))
        except ConfigError as error:
            reason = error.violations[0].reason
            raise ConfigError([Violation("checkpoint", folder, reason)]) from None
        if found is None:
            reason = "the run has saved no checkpoint yet"
            raise ConfigError([Violation("checkpoint", folder, reason)])
        source = found
    chunks, _ = build_model(config)
    path = restore.load_model(source, chunks)
    try:
        return chunks[0].eval(), load_tokenizer(path / restore.TOKENIZER)
    except DataError as error:
        raise ConfigError([Violation("checkpoint", path, str(error))]) from None


def keep_one_order() -> None:
    """Let this process decode as `batch_invariant` says; a line where that changes nothing.

    Raises:
        ConfigError: the device cannot.
    """
    from pangu.inference.batch_invariant import decode_in_one_order

    try:
        if said := decode_in_one_order():
            print(f"note: {said}", file=sys.stderr)
    except ValueError as error:
        raise ConfigError([Violation("batch_invariant", True, str(error))]) from None


_LONGEST = 8  # guesses, where their number is chosen for each pass


def add_drafter(
    engine: Engine,
    kind: str,
    tokens: int | str,
    draft: str,
    config: Config | None = None,
    *,
    branch: bool = False,
) -> None:
    """Let `engine` decode with guesses of `tokens` tokens: kind "none", "ngram", "draft" for those
    of the model in the folder `draft`, or "mtp" for those of the model's own leap heads or
    layers. "auto" makes as many as pay: until a pass was measured, by what the simulator expects
    of `config`, if that names a machine. With `branch`, guesses are trees of so many. Collective.

    Raises:
        ConfigError: there is no model in `draft`, it has other tokens, or there are no such layers.
    """
    if kind == "none":
        return
    most = _LONGEST if tokens == "auto" else int(tokens)
    _add(engine, kind, most, draft, config)
    if branch:
        engine.draft_tokens = most  # several for a place
        engine.branch_drafts()
    if tokens == "auto":
        engine.adapt_drafts(_expected(config) if config and config.hardware else None)


def _expected(config: Config) -> Callable[[int, int], float]:
    """Seconds of a pass of so many sequences × tokens, as the simulator has them."""
    from simulator.api import decoding_seconds

    return lambda sequences, tokens: float(decoding_seconds(config, sequences, tokens))


def _add(engine: Engine, kind: str, tokens: int, draft: str, config: Config | None) -> None:
    from pangu.inference.speculative import ModelDrafter, NgramDrafter

    if kind == "mtp":
        try:
            engine.draft_by_itself()
        except ValueError as error:
            raise ConfigError([Violation("speculative", kind, str(error))]) from None
        engine.draft_tokens = min(tokens, engine.draft_tokens)
        return
    engine.draft_tokens = tokens
    if kind == "ngram":
        engine.drafter = NgramDrafter()
        return
    folder = Path(draft)
    try:
        own_config = read_run_config(folder)
        if config:
            own_config = _beside(own_config, config)
        model, tokenizer = load_for_inference(own_config, folder)
    except ConfigError as error:
        raise ConfigError([Violation("draft", draft, error.violations[0].reason)]) from None
    own = engine.tokenizer
    if own is None or tokenizer.unique_identifiers != own.unique_identifiers:
        raise ConfigError([Violation("draft", draft, "its tokenizer is not the model's")])
    engine.drafter = ModelDrafter(model, engine.scheduler, tokenizer.vocab_size, engine.replica)


def _beside(draft: Config, config: Config) -> Config:
    """A smaller model in the processes of `config`.

    Raises:
        ConfigError: it does not split so.
    """
    experts = config.parallel.expert_model_parallel_size if draft.model.num_experts else 1
    parallel = replace(config.parallel, expert_model_parallel_size=experts)
    found = replace(draft, parallel=parallel, launch=config.launch)
    for problem in widths(found):
        raise ConfigError([Violation(problem.key, problem.value, problem.reason)])
    return found
