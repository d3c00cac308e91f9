"""The end of a run: a sample, the baselines, the plots and the summary on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from configs.schema import Config
from pangu.data.datasets import Datasets, token_rows
from pangu.data.ngram import NgramModels
from pangu.inference.decode import generate, obstacle
from pangu.inference.sampling import Sampler
from pangu.report.run_files import BASELINES, SAMPLE, replace_text
from pangu.training import schedule

if TYPE_CHECKING:
    from pangu.training.loop import Trainer

# Counting n-grams of so many training tokens takes some seconds; more are cut off.
_MOST_TOKENS = 12_000_000
_PROBE_SEQUENCES = 512  # of the training data, for the n-grams' training loss
_SAMPLE_TOKENS = 128
_TEMPERATURE, _TOP_P = 0.8, 0.95


def finish(trainer: Trainer) -> None:
    """Write sample, baselines, plots and page into the run folder and print the summary.

    Collective: every rank takes part in generating the sample. A disk that is full is reported;
    the run has ended well all the same.
    """
    text = sample(trainer)
    if dist.get_rank() != 0:
        return
    from pangu.report.page import write_page
    from pangu.report.plots import write_plots
    from pangu.report.run_data import ReportError, read_run
    from pangu.report.summary import print_summary

    folder = Path(trainer.config.run_dir)
    try:
        replace_text(folder / SAMPLE, text)
        losses = baselines(trainer.config, trainer.datasets, trainer.phase.phase)
        replace_text(folder / BASELINES, json.dumps(losses))
        run = read_run(folder)
        print_summary(run, [*write_plots(run), write_page(run)])
    except (OSError, ReportError) as error:
        print(f"warning: the report could not be written: {error}", file=sys.stderr)


def sample(trainer: Trainer) -> str:
    """A document from its very beginning, or why there is none. Collective."""
    tokenizer = trainer.datasets.tokenizer
    if reason := obstacle(trainer.config.parallel):
        return f"No sample from this layout: {reason}. python -m pangu.generate has one process."
    tokens = generate(
        unwrap_model(trainer.chunks[0]),
        [tokenizer.eod],
        Sampler(temperature=_TEMPERATURE, top_p=_TOP_P, seed=trainer.config.seed),
        max_new_tokens=_SAMPLE_TOKENS,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )
    return tokenizer.decode(list(tokens))


def baselines(
    config: Config, datasets: Datasets, phase: schedule.Phase
) -> dict[str, dict[str, float | None]]:
    """Training and held-out loss of the unigram and the bigram model of the training tokens.

    They are counted on one pass over the training data, seen by the run or not, and judged on the
    very tokens that validation sees.
    """
    seq_length = schedule.seq_length(config, phase)
    train = token_rows(datasets.train, _one_pass(datasets.train, seq_length))
    models = NgramModels.fit(train, config.model.vocab_size)
    training = models.losses(train[:: max(1, len(train) // _PROBE_SEQUENCES)])
    held_out: dict[str, float] = {}
    if datasets.validation is not None:
        batch = schedule.global_batch_size(config, phase)
        count = config.train.validation_batches * batch
        held_out = models.losses(token_rows(datasets.validation, count))
    return {
        name: {"training": loss, "held_out": held_out.get(name)} for name, loss in training.items()
    }


def _one_pass(dataset: object, seq_length: int) -> int:
    """Sequences until the data repeat, which would let the n-grams see their tuning part."""
    from pangu.data.indexed import SequenceDataset, count_tokens

    parts = getattr(dataset, "datasets", [dataset])
    files = [part.dataset_path for part in parts if isinstance(part, SequenceDataset)]
    tokens = sum(map(count_tokens, files)) if files else _MOST_TOKENS
    return int(np.minimum(tokens, _MOST_TOKENS)) // seq_length
