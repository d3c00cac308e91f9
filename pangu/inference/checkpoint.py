"""A trained model, ready to generate."""

from __future__ import annotations

from pathlib import Path

from megatron.core.models.gpt import GPTModel

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.checkpoint import manifest, restore
from pangu.data import DataError
from pangu.data.tokenizer import Tokenizer, load_tokenizer
from pangu.model.build import build_model


def load_for_inference(config: Config, folder: Path) -> tuple[GPTModel, Tokenizer]:
    """Model and tokenizer of a run folder's newest sound checkpoint, or of a checkpoint folder.

    Collective. `config` describes the model and the layout to load it into.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it does not fit the model.
    """
    source: Path | restore.Found = folder
    path = folder
    if not (folder / manifest.MANIFEST).is_file():  # a run's folder, not a checkpoint's
        try:
            found = restore.newest(config)
        except ConfigError as error:
            reason = error.violations[0].reason
            raise ConfigError([Violation("checkpoint", folder, reason)]) from None
        if found is None:
            reason = "the run has saved no checkpoint yet"
            raise ConfigError([Violation("checkpoint", folder, reason)])
        source, path = found, found.path
    try:
        tokenizer = load_tokenizer(path / restore.TOKENIZER)
    except DataError as error:
        raise ConfigError([Violation("checkpoint", path, str(error))]) from None
    chunks, _ = build_model(config)
    restore.load_model(source, chunks)
    return chunks[0], tokenizer
