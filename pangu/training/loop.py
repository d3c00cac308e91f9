"""The training loop, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from configs.dispatch import explained
from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.checkpoint import restore
from pangu.checkpoint.run_state import RunState
from pangu.checkpoint.saver import Saved, Saver
from pangu.data.datasets import Datasets, batches, build_datasets, sequences_held
from pangu.engines.contract import Batch, Engine, StepShape
from pangu.engines.placement import ExpertPlacement
from pangu.engines.ranks import from_rank_0, say
from pangu.moe.load import read_expert_bias
from pangu.report.run_files import read_metrics
from pangu.training import pace, schedule
from pangu.training.expert_load import LoadWindow
from pangu.training.forecast import announce, compare, forecast
from pangu.training.metrics import MetricsFile, describe_run
from pangu.training.pace import Pace
from pangu.training.profile import Profile
from pangu.training.progress import Progress
from pangu.training.resilience import Diverged, SkippedSteps, StopSignal
from pangu.training.under_way import Planned, StepsUnderWay
from simulator.api import Forecast

LOAD_INTERVAL = 100  # steps over which an expert that nobody chose counts as dead


@dataclass
class Trainer:
    """Everything a run holds on this rank."""

    config: Config
    engine: Engine
    phase: schedule.PhaseAt
    datasets: Datasets
    state: RunState
    metrics: MetricsFile
    load: LoadWindow
    stop: StopSignal

    def __post_init__(self) -> None:
        self.saver = Saver(self.config, self.engine, self.datasets.tokenizer)
        self.placement = ExpertPlacement(self.config, self.engine)
        self.skipped = SkippedSteps(self.config.train.max_skipped_steps)
        self.last_started = self.last_saved = self.state.step
        self.rolled_back_to: int | None = None
        self.leaving, self.save_error = False, ""
        self.last_validated = -1
        self.pace = Pace(self.engine.replicas())
        self.under_way = StepsUnderWay(
            self.config,
            self.engine,
            placement=self.placement,
            profile=Profile(self.config),
            stop=self.stop,
        )

    def train(self) -> int:
        """Run from the current state to the last step, or until told to stop; the exit code.

        Raises:
            Diverged: too many steps were not finite.
            ConfigError: the run folder cannot be written to.
        """
        self.begin()
        rank, devices = dist.get_rank(), dist.get_world_size()
        with Progress(self.config, self.state.step, active=rank == 0, devices=devices) as progress:
            progress.say(describe_run(self.config))
            if self.config.model.num_experts:
                progress.say(explained(self.config))
            expected = forecast(self.config, devices)
            if expected is not None:
                progress.say(announce(expected))
            first_step = self.state.step
            if first_step >= self.config.train.steps:
                steps = f"train.steps={self.config.train.steps}"
                progress.say(
                    f"nothing to train: {steps}, and the checkpoint is of step {first_step}"
                )
            if repeated := self.repeated_validation():
                progress.warn(repeated)
            train_batches = self.train_batches()
            while self.state.step < self.config.train.steps and not self.stopping():
                if self.enter_phase():
                    train_batches = self.train_batches()
                self.one_step(train_batches)
                self.read_steps(progress, 0 if self.must_know() else self.under_way.ahead)
                if self.skipped.too_many():
                    self.read_steps(progress)
                    self.roll_back()
                    train_batches = self.train_batches()
                    continue
                if self.due(pace.INTERVAL) and (slow := self.pace.compare()):
                    progress.warn(slow)
                if self.due(LOAD_INTERVAL):
                    dead = self.load.end_interval(read_expert_bias(self.engine.chunks))
                    if dead:
                        progress.warn(dead)
                if self.datasets.validation and self.due(self.config.train.validate_every):
                    self.validate(progress)
                self.save_if_due()
            self.read_steps(progress)
            if isinstance(expected, Forecast) and rank == 0:
                rows = [row for row in read_metrics(self.metrics.path) if row["step"] > first_step]
                if line := compare(expected, rows):
                    progress.say(line)
        code = self.leave()
        self.metrics.close()
        return code

    def begin(self) -> None:
        """Clear the run folder of what is later than the current step.

        Raises:
            ConfigError: it cannot be written to.
        """
        step, run_dir = self.state.step, self.config.run_dir
        try:
            from_rank_0(lambda: self.metrics.continue_after(step))
            self.saver.prepare(step)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            reason = f"cannot go on from step {step}: {where}{error.strerror}"
            hint = "room and permission there, or another run_dir"
            raise ConfigError([Violation("run_dir", run_dir, reason, hint)]) from None

    def beside(self) -> dict[str, str]:
        """What the next step shares the machine with, or comes after: its rate tells of that."""
        if self.saver.writing:
            return {"beside": "save"}
        return {"beside": "validation"} if self.last_validated == self.state.step else {}

    def enter_phase(self) -> bool:
        """Change data when the next step belongs to another phase; whether it does."""
        phase = schedule.phase_at(self.config, self.state.step)
        if phase == self.phase:
            return False
        self.phase = phase
        self.state.consumed_sequences = 0
        self.datasets = phase_datasets(self.config, phase, self.state)
        return True

    def repeated_validation(self) -> str:
        """A sentence where a validation reads held-out sequences more than once."""
        train, phase = self.config.train, self.phase.phase
        if not train.validate_every or self.datasets.validation is None:
            return ""
        batch = schedule.global_batch_size(self.config, phase)
        seq_length = schedule.seq_length(self.config, phase)
        held = sequences_held(self.datasets.validation, seq_length)
        if held is None or train.validation_batches * batch <= held:
            return ""
        return (
            f"train.validation_batches={train.validation_batches} are "
            f"{train.validation_batches * batch} sequences, and the held-out corpus holds {held}: "
            f"some count more than once. {max(1, held // batch)} batches read each at most once"
        )

    def save_if_due(self) -> None:
        """Start a checkpoint every `checkpoint.save_every` steps; training goes on meanwhile."""
        c = self.config.checkpoint
        self.note(self.saver.poll())
        every, step = c.save_every, self.state.step
        if step >= self.config.train.steps and c.save_at_end:
            return  # `leave` saves it
        # Not among skipped steps, whose weights may be what is wrong: the next good step saves.
        if every and step // every > self.last_started // every and not self.skipped.in_a_row:
            self.save()
            # A forked writer keeps the memory of this step, but shares a file with those to come.
            if not c.async_save or self.config.memory.swap_optimizer:
                self.note(self.saver.finish())

    def save(self) -> None:
        """Start a checkpoint of this step, after the one under way, if any."""
        self.note(self.saver.finish())
        self.last_started = self.state.step
        with self.placement.at_home():
            self.note(self.saver.start(self.state))

    def note(self, saved: Saved | None) -> None:
        """Take note of how a save ended; a failed one goes into the metrics."""
        if saved is None:
            return
        if saved.error is None:
            self.last_saved = saved.step
            return
        self.metrics.write({"step": saved.step, "checkpoint_error": saved.error})
        self.save_error = saved.error
        if saved.step < self.state.step or not self.leaving:  # else `lost` says it
            say(
                f"warning: the checkpoint of step {saved.step} could not be saved ({saved.error}); "
                "those before it are untouched"
            )

    def leave(self) -> int:
        """Save where the run has ended or was told to stop, but not among skipped steps.

        The exit code is 3 when the last step of all was not finite, 1 when the last steps should
        be on disk and are not (see `lost`), else 0.
        """
        step, self.leaving = self.state.step, True
        finished = step >= self.config.train.steps
        self.note(self.saver.finish())
        wanted = not finished or self.config.checkpoint.save_at_end
        if wanted and self.last_saved < step and not self.skipped.in_a_row:
            self.save()
            self.note(self.saver.finish())
        if not (finished and self.skipped.in_a_row):
            self.saver.close()
        if not finished:
            say(f"told to stop after step {step}")
        if finished and self.skipped.in_a_row:
            return 3
        return 1 if wanted and self.last_saved < step else 0

    def lost(self) -> str:
        """A sentence on the steps that no checkpoint has."""
        step, steps = self.state.step, f"{self.last_saved + 1} to {self.state.step}"
        newest = (
            f"the last one is of step {self.last_saved}" if self.last_saved else "there is none"
        )
        if bad := self.skipped.in_a_row:
            last = f"step {step} was" if bad == 1 else f"the last {bad} steps were"
            advice = (
                "Start the same command again: it goes on from there."
                if step < self.config.train.steps
                else "A lower optimizer.lr, or a longer warm-up, from a checkpoint before it."
            )
            return (
                f"error: {last} not finite, and weights among such steps are not saved: steps "
                f"{steps} are in no checkpoint ({newest}). {advice}"
            )
        return (
            f"error: the checkpoint of step {step} could not be saved ({self.save_error}), and "
            f"steps {steps} are in no other: {newest}. Make room and start the same command again: "
            "it goes on from there."
        )

    def roll_back(self) -> None:
        """Weights, optimizer and step of the last checkpoint; the data move on.

        Raises:
            Diverged: there have been too many rollbacks, or there is nothing to go back to.
        """
        now, limit = self.state, self.config.train.max_rollbacks
        self.note(self.saver.finish())
        trouble = f"{self.skipped.in_a_row} steps in a row up to {now.step} were not finite"
        if now.rollbacks >= limit:
            raise Diverged(f"{trouble}, after {limit} rollbacks (train.max_rollbacks)")
        found = restore.newest(self.config.run_dir)
        if found is None:
            raise Diverged(f"{trouble}, and there is no checkpoint to go back to")
        if found.manifest.step == self.rolled_back_to:
            found = restore.newest(self.config.run_dir, before=self.rolled_back_to) or found
        say(f"{trouble}: rolling back to step {found.manifest.step}")
        self.placement.forget()
        self.state = restore.restore(self.config, found, self.engine).state
        self.rolled_back_to = self.last_started = self.last_saved = self.state.step
        phase = schedule.phase_at(self.config, self.state.step)
        if phase == self.phase:  # the data move on; an earlier phase's are read again
            self.state.consumed_sequences = now.consumed_sequences
        self.state.skipped_steps = now.skipped_steps
        self.state.rollbacks = now.rollbacks + 1
        self.begin()
        self.metrics.write({"step": self.state.step, "rolled_back_from": now.step})
        self.skipped.count(False)
        self.phase, self.datasets = phase, phase_datasets(self.config, phase, self.state)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        step = self.state.step
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def one_step(self, train_batches: Iterator[Batch]) -> None:
        """Queue a step; `read_steps` reads what it did."""
        planned = Planned(
            step=self.state.step + 1,
            learning_rate=schedule.learning_rate(self.config, self.state.step),
            sequences=schedule.global_batch_size(self.config, self.phase.phase),
            shape=self.shape(),
            beside=self.beside(),
        )
        self.under_way.launch(train_batches, planned)
        self.state.step += 1
        self.state.consumed_sequences += planned.sequences

    def read_steps(self, progress: Progress, leave: int = 0) -> None:
        """Take note of the steps that are over, but for the last `leave`."""
        for over in self.under_way.read(leave):
            step = over.row["step"]
            self.pace.add(over.own_seconds)
            self.state.skipped_steps += over.result.skipped
            self.skipped.count(over.result.skipped)
            if over.load:
                self.load.add(step, over.load.counts)
            if over.result.skipped:
                over.row["skipped_steps"] = self.state.skipped_steps
            self.metrics.write(over.row)
            progress.show(over.row)

    def must_know(self) -> bool:
        """Whether what comes next needs to know what all steps did: whatever is written, compared
        or judged. A step that is not finite is known before anything is saved."""
        train, c, step = self.config.train, self.config.checkpoint, self.state.step
        every = (pace.INTERVAL, LOAD_INTERVAL, train.validate_every)
        saves = bool(c.save_every) and step // c.save_every > self.last_started // c.save_every
        return saves or any(map(self.due, every)) or step >= train.steps

    def stopping(self) -> bool:
        """Whether all ranks know that they have been told to stop. Collective."""
        return self.stop.heard() if self.under_way.ahead else self.stop.agreed()

    def shape(self) -> StepShape:
        """What this replica computes per step."""
        phase, micro = self.phase.phase, self.config.train.micro_batch_size
        batch = schedule.global_batch_size(self.config, phase)
        return StepShape(
            batch // self.engine.data_parallel_size // micro,
            micro,
            schedule.seq_length(self.config, phase),
        )

    def train_batches(self) -> Iterator[Batch]:
        """The training data of this replica from here on."""
        return self._batches(self.datasets.train, self.state.consumed_sequences)

    def validate(self, progress: Progress) -> None:
        """Held-out loss over `train.validation_batches` global batches, always the same ones.

        Given up, without a result, between two batches when the run is told to stop.
        """
        held_out = self._batches(self.datasets.validation, 0)
        step, count, total = self.state.step, self.config.train.validation_batches, 0.0
        for done in range(count):
            progress.validating(step, done, count)
            if self.stop.agreed():
                progress.say(f"step {step}: validation given up after {done} of {count} batches")
                return
            total += self.engine.evaluate(held_out, self.shape())
        self.last_validated = step
        self.metrics.write({"step": step, "validation_loss": total / count})
        progress.show_validation(step, total / count)

    def _batches(self, dataset: Any, consumed: int) -> Iterator[Batch]:
        return batches(
            dataset,
            self.config,
            data_parallel_rank=self.engine.data_parallel_rank,
            data_parallel_size=self.engine.data_parallel_size,
            consumed_sequences=consumed,
            micro_batch_size=self.config.train.micro_batch_size,
        )


def phase_datasets(config: Config, at: schedule.PhaseAt, state: RunState) -> Datasets:
    """The data of one phase, enough to get from `state` to its end. Each phase has an order of
    its own, from the seed and its first step, so that the same corpus is not read twice in the
    same order."""
    sequences = schedule.global_batch_size(config, at.phase)
    end = at.first_step + at.phase.steps
    if at.phase == schedule.phases(config)[-1]:
        end = max(end, config.train.steps)
    return build_datasets(
        replace(config, seed=config.seed + at.first_step),
        train_samples=state.consumed_sequences + (end - state.step) * sequences,
        validation_samples=config.train.validation_batches * sequences,
        seq_length=schedule.seq_length(config, at.phase),
    )
