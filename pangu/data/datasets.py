"""From a configuration to batches of tokens.

The order of sequences is a function of the seed alone. A run that has consumed n sequences goes on
with sequence n, whatever its layout; in each step the replicas share consecutive sequences:

    micro-batch i of replica r = sequences n + (i * replicas + r) * micro_batch_size + [0, mbs)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.data import DataError
from pangu.data.files import Blend, blends
from pangu.data.index_file import read_structure
from pangu.data.stdlib import prepare_standard_library
from pangu.data.synthetic import SyntheticDataset
from pangu.data.tokenizer import INFO_FILE, NumberTokenizer, Tokenizer, load_tokenizer
from pangu.processes import die_with_parent

_VALIDATION_SEED = 0  # the same held-out sequences whatever the run's seed
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_DOCUMENTS = ("document_ids", "documents")  # where they are wanted


@dataclass(frozen=True)
class Datasets:
    """Map-style datasets whose item i is sequence i; `validation` may be None in a run that does
    not validate."""

    train: Any
    validation: Any | None
    tokenizer: Tokenizer


def build_datasets(
    config: Config, *, train_samples: int, validation_samples: int, seq_length: int
) -> Datasets:
    """Datasets of at least so many sequences of `seq_length` tokens.

    Collective: with torch.distributed initialised, every rank calls it.

    Raises:
        ConfigError: naming every corpus that is missing, damaged or does not fit the model.
    """
    vocab_size = config.model.vocab_size
    if config.data.name == "synthetic":
        # one past any training seed's stream: the validation tokens are others
        others = (validation_samples, seq_length, vocab_size, config.seed + 2**32)
        return Datasets(
            SyntheticDataset(train_samples, seq_length, vocab_size, config.seed),
            SyntheticDataset(*others) if validation_samples else None,
            NumberTokenizer(vocab_size),
        )
    blend, validation_blend = _resolve_blends(config)
    violations = [
        *_check_tokenizers({**blend, **validation_blend}),
        *_check_blend("data.blend", blend, seq_length),
        *_check_blend("data.validation_blend", validation_blend, seq_length),
    ]
    try:
        tokenizer = corpus_tokenizer(config)
    except ConfigError as error:
        # Beside a corpus that is not there, there is no tokenizer either.
        raise ConfigError(violations or error.violations) from None
    if tokenizer.vocab_size > vocab_size:
        violations.append(
            Violation(
                "model.vocab_size",
                vocab_size,
                f"the corpus' tokenizer has {tokenizer.vocab_size} tokens",
                f"at least {tokenizer.vocab_size}",
            )
        )
    if config.train.validate_every and validation_samples and not validation_blend:
        violations.append(
            Violation(
                "data.validation_blend",
                "{}",
                "there is no held-out corpus beside the training files to validate on",
                "name one, or train.validate_every=0",
            )
        )
    if violations:
        raise ConfigError(violations)
    of_training = {"split": 0, "samples": train_samples, "seed": config.seed}
    train = _build(config, blend, tokenizer, seq_length=seq_length, **of_training)
    validation = None
    if validation_blend and validation_samples:
        held_out = {"split": 1, "samples": validation_samples, "seed": _VALIDATION_SEED}
        validation = _build(config, validation_blend, tokenizer, seq_length=seq_length, **held_out)
    return Datasets(train, validation, tokenizer)


def _resolve_blends(config: Config) -> tuple[Blend, Blend]:
    """Weights of the training and validation files, by prefix. Prepares the default corpus on
    first use."""
    data = config.data
    if data.name != "stdlib":
        return blends(data)
    try:
        folder = prepare_standard_library(data.cache_dir, config.model.vocab_size)
    except DataError as error:
        raise ConfigError([Violation("data.name", data.name, str(error))]) from None
    return {str(folder / "train"): 1.0}, {str(folder / "validation"): 1.0}


def corpus_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that wrote the corpus: `data.tokenizer`, or the one beside its files.

    Raises:
        ConfigError: when there is none.
    """
    if config.data.name == "synthetic":
        return NumberTokenizer(config.model.vocab_size)
    path = config.data.tokenizer or str(Path(next(iter(_resolve_blends(config)[0]))).parent)
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise ConfigError([Violation("data.tokenizer", path, str(error))]) from None


def _check_tokenizers(blend: dict[str, float]) -> list[Violation]:
    """Corpora of different tokenizers must not meet; files from elsewhere do not say."""
    first: tuple[str, str] | None = None
    violations = []
    for prefix in blend:
        info = Path(prefix).with_name(INFO_FILE)
        if not info.is_file():
            continue
        written_with = info.read_text()
        first = first or (prefix, written_with)
        if written_with != first[1]:
            reason = f"it was written with another tokenizer than {first[0]}"
            violations.append(Violation("data.blend", prefix, reason))
    return violations


def _check_blend(key: str, blend: dict[str, float], seq_length: int) -> list[Violation]:
    violations = []
    for prefix in blend:
        try:
            tokens = read_structure(prefix).tokens
        except DataError as error:
            violations.append(Violation(key, prefix, str(error)))
            continue
        if tokens <= seq_length:
            violations.append(
                Violation(
                    key,
                    prefix,
                    f"its {tokens} tokens do not fill one sequence of {seq_length} and its label",
                    f"train.seq_length up to {tokens - 1}",
                )
            )
    return violations


def _of_tokens(config: Config, blend: dict[str, float]) -> list[float]:
    """The weights of a blend as parts of its tokens: sequences are equally long, so that a corpus
    whose documents are twice as long gives half as many of them with each."""
    if config.data.blend_by == "tokens":
        return list(blend.values())
    files = {prefix: read_structure(prefix) for prefix in blend}
    lengths = {prefix: each.tokens / (len(each.documents) - 1) for prefix, each in files.items()}
    return [weight * lengths[prefix] for prefix, weight in blend.items()]


def _build(
    config: Config,
    blend: dict[str, float],
    tokenizer: Tokenizer,
    *,
    split: int,
    samples: int,
    seq_length: int,
    seed: int,
) -> Any:
    """The dataset of one split with megatron-core's builder; 0 is training, 1 validation."""
    from pangu.data.blend import BlendBuilder
    from pangu.data.indexed import SequenceConfig, SequenceDataset

    blends: list[Any] = [None, None, None]
    blends[split] = (list(blend), _of_tokens(config, blend))
    sizes = [0, 0, 0]
    sizes[split] = samples
    dataset_config = SequenceConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=blends,
        num_dataset_builder_threads=min(8, len(blend)),
        tokenizer=tokenizer,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,  # the attention makes its own from document_ids
        index_dir=str(Path(config.data.cache_dir) / "index"),
        vocab_size=config.model.vocab_size,
        documents=config.model.leap_heads > 0,
    )
    return BlendBuilder(SequenceDataset, sizes, lambda: True, dataset_config).build()[split]


def batches(
    dataset: Any,
    config: Config,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_sequences: int,
    micro_batch_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one data-parallel replica, from `consumed_sequences` to the end.

    Yields CPU tensors `[batch, seq]`: `tokens`, `labels`, `position_ids` int64, `loss_mask`
    float32; with `data.reset_attention_mask`, `document_ids` int32; of a corpus and with leap
    heads, `documents` `[batch, seq + 1]` int32.

    Raises:
        DataError: when the data hold a token outside the model's vocabulary.
    """
    stride = data_parallel_size * micro_batch_size
    first = consumed_sequences + data_parallel_rank * micro_batch_size
    whole = (len(dataset) - consumed_sequences) // stride  # every replica gets as many
    positions = (
        [*range(first + i * stride, first + i * stride + micro_batch_size)] for i in range(whole)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=config.data.num_workers,
        worker_init_fn=_begin_worker,
        collate_fn=_collate,
        # else the loader draws from the global state, which a checkpoint must find untouched
        generator=torch.Generator(),
    )
    return _in_a_sentence(iter(loader))


def _in_a_sentence(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """torch hands on what a worker raised with that worker's traceback as its message."""
    try:
        yield from batches
    except DataError as error:
        name = f"{DataError.__module__}.{DataError.__name__}: "
        raise DataError(str(error).rpartition(name)[2].strip()) from None


def _begin_worker(number: int) -> None:
    """A process that reads batches ahead: it ends with the run, and not before it.

    Launchers signal whole process groups, and the run may validate and save after it. Only its
    own process can end it: torch does so where an error has ended the run.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    keys = (*_KEYS, *(key for key in _DOCUMENTS if key in samples[0]))
    return {key: torch.stack([sample[key] for sample in samples]) for key in keys}


def sequences_held(dataset: Any, seq_length: int) -> int | None:
    """Sequences of a corpus until they repeat; None where they never do (synthetic ones)."""
    from pangu.data.indexed import SequenceDataset

    parts = getattr(dataset, "datasets", [dataset])
    files = [part.dataset_path for part in parts if isinstance(part, SequenceDataset)]
    # Each sequence's last label is the next one's first token.
    return sum((read_structure(file).tokens - 1) // seq_length for file in files) if files else None


def token_rows(dataset: Any, count: int) -> np.ndarray:
    """Tokens of the first `count` sequences with their last label, `[count, seq + 1]` int64."""
    return np.stack([dataset.text(index) for index in range(min(count, len(dataset)))])
