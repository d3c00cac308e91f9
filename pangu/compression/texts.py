"""The texts of a compression: what it is calibrated on, and what it is judged by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.new_folder import NEW as MODEL
from pangu.new_folder import workplace

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from pangu.data.tokenizer import Tokenizer
    from pangu.trained_model import Trained

Progress = Callable[[Iterable], Iterable]
OWN = Path("self")  # in place of a calibration file: what the model itself writes


@dataclass(frozen=True)
class Texts:
    """`calibration`, of which the first `tokens` tokens serve, in windows of `window`; `judged_by`
    is another text, or None: the calibration text again. `key` is the option that names it."""

    calibration: Path
    tokens: int
    window: int
    judged_by: Path | None = None
    key: str = "--calibration"

    def window_of(self, config: Config) -> int:
        """Tokens that see each other: no more than the model was made for."""
        return min(self.window, config.model.max_position_embeddings)

    def check(self) -> None:
        """Before hours are spent on a model.

        Raises:
            ConfigError: a file cannot be read.
        """
        if self.calibration != OWN:
            read(self.key, self.calibration)
        if self.judged_by is not None:
            read("--text", self.judged_by)

    def calibration_ids(self, tokenizer: Tokenizer) -> list[int]:
        return self._ids(self.key, self.calibration, tokenizer)

    def judging_ids(self, tokenizer: Tokenizer) -> list[int]:
        """As many tokens of the judging text."""
        if self.judged_by is None:
            return self.calibration_ids(tokenizer)
        return self._ids("--text", self.judged_by, tokenizer)

    def _ids(self, key: str, path: Path, tokenizer: Tokenizer) -> list[int]:
        """Raises:
        ConfigError: the file cannot be read, or has not even two tokens.
        """
        ids = tokenizer.encode(read(key, path))[: self.tokens]
        if len(ids) < 2:
            raise ConfigError([Violation(key, path, "has not even two tokens")])
        return ids


def read(key: str, path: Path) -> str:
    """A UTF-8 file.

    Raises:
        ConfigError: naming `key`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Violation(key, path, f"cannot be read: {error}")]) from None


@dataclass(frozen=True)
class Row:
    """A model in the table of a compression: its parameters and its mean -log p per token."""

    name: str
    parameters: int
    nats_per_token: float


def judge(name: str, trained: Trained, texts: Texts, progress: Progress) -> Row:
    """How the model finds the judging text."""
    from pangu.inference.likelihood import text_likelihood

    ids = texts.judging_ids(trained.tokenizer)
    found = text_likelihood(trained.model, ids, texts.window_of(trained.config), progress)
    count = sum(parameter.numel() for parameter in trained.model.parameters())
    return Row(name, count, found.nats / found.tokens)


def table(rows: list[Row], texts: Texts) -> str:
    """Size and perplexity, a line for each model."""
    lines = [f"{'':16}{'parameters':>16}{'perplexity':>12}"]
    for row in rows:
        perplexity = math.exp(min(row.nats_per_token, 700.0))
        lines.append(f"{row.name:16}{row.parameters:16,}{perplexity:12.3f}")
    return "\n".join([*lines, f"(perplexity on {texts.judged_by or texts.calibration})"])


def refuse_broken(model: GPTModel, folder: Path) -> None:
    """Look at every weight before hours are spent on them.

    Raises:
        ConfigError: one is not finite, or has an adapter beside it.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        reason = "has adapters: `pangu.convert export` merges them, and `import` takes the result"
        raise ConfigError([Violation("MODEL", folder, reason)])
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            reason = f"{name} holds numbers that are not finite"
            raise ConfigError([Violation("MODEL", folder, reason)])


@contextlib.contextmanager
def new_model(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is on the way there. Its `MODEL` becomes `out` when the block
    has not failed; the rest is gone.

    Raises:
        ConfigError: there is something at `out` already, no room for it, or somebody else is at it.
    """
    with workplace(out) as work:
        yield work
        try:
            (work / MODEL).rename(out)
        except OSError as error:
            reason = f"could not be written: {error.strerror}"
            raise ConfigError([Violation("--out", out, reason)]) from None
