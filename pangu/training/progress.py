"""What a person sees while the run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from configs.schema import Config
from pangu.report.run_files import perplexity

_LINES_APART = 10  # in a log file, lines are this many times `train.log_every` steps apart
# Between two words about a validation under way.
_BAR_SECONDS, _LINE_SECONDS = 0.2, 20.0
_BAR = "{n_fmt}/{total_fmt} |{bar:20}| {percentage:3.0f}% {desc}, ETA {remaining}"


class Progress:
    """Loss, tokens/s (of all devices) and remaining time, on standard error."""

    def __init__(self, config: Config, step: int, *, active: bool, devices: int) -> None:
        self._steps = config.train.steps
        self._log_every = max(1, config.train.log_every)
        self._active, self._devices = active, devices
        self._first, self._started = step, time.perf_counter()
        self._validation_started = self._last_said = self._started
        self._bar = None
        if active and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps,
                initial=step,
                desc="starting",
                bar_format=_BAR,
                dynamic_ncols=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, row: dict[str, Any]) -> None:
        """Report a step."""
        step, rate = row["step"], row["tokens_per_second_per_device"] * self._devices
        text = f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s"
        if self._bar is not None:
            if step % self._log_every == 0:
                self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step in (self._first + 1, self._steps) or not step % (self._log_every * _LINES_APART):
            self.say(f"step {step}/{self._steps}: {text}, ETA {self._remaining(step)}")

    def validating(self, step: int, done: int, batches: int) -> None:
        """Report that a validation has `done` so many of its batches."""
        now = time.perf_counter()
        if done == 0:
            self._validation_started = self._last_said = now
        if now - self._last_said < (_BAR_SECONDS if self._bar is not None else _LINE_SECONDS):
            return
        self._last_said = now
        text = f"validation batch {done}/{batches}"
        if self._bar is not None:
            self._bar.set_description_str(text)
            return
        left = (now - self._validation_started) / done * (batches - done)
        self.say(f"step {step}/{self._steps}: {text}, ETA {tqdm.format_interval(left)}")

    def show_validation(self, step: int, loss: float) -> None:
        """Report a validation."""
        self.say(
            f"step {step}/{self._steps}: held-out loss {loss:.3f}, perplexity {perplexity(loss)}"
        )

    def warn(self, sentence: str) -> None:
        """Report something that the user should know."""
        self.say(f"warning: {sentence}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._active:
            print(line, file=sys.stderr, flush=True)

    def _remaining(self, step: int) -> str:
        seconds = (time.perf_counter() - self._started) / max(1, step - self._first)
        return tqdm.format_interval(seconds * (self._steps - step))
