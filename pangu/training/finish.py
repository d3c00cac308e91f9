"""The end of a run: a sample, the baselines, the plots and the summary on the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.utils import unwrap_model

from configs.schema import Config
from pangu.data.datasets import Datasets, sequences_held, token_rows
from pangu.data.ngram import NgramModels
from pangu.engines.ranks import say
from pangu.inference.batching import Request
from pangu.inference.engine import NotFinite, generate
from pangu.inference.forward import obstacle
from pangu.inference.sampling import Sampling
from pangu.report.run_files import BASELINES, SAMPLE, replace_text
from pangu.training import schedule

if TYPE_CHECKING:
    from pangu.training.loop import Trainer

# Counting n-grams of so many training tokens takes some seconds; more are cut off.
_MOST_TOKENS = 12_000_000
_PROBE_SEQUENCES = 512  # of the training data, for the n-grams' training loss
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def finish(trainer: Trainer) -> None:
    """Write sample, baselines, plots and page into the run folder and print the summary.

    Collective: every rank takes part in generating the sample. A disk that is full is reported;
    the run has ended well all the same.
    """
    text = "" if trainer.stop.agreed() else sample(trainer)
    stopped = trainer.stop.agreed()
    if dist.get_rank() != 0:
        return
    if stopped:
        run_dir = trainer.config.run_dir
        say(f"told to stop: no report was written; python -m pangu.report {run_dir} makes it")
        return
    from pangu.report import ReportError
    from pangu.report.page import write_page
    from pangu.report.plots import write_plots
    from pangu.report.run_data import read_run
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


def _sample_length(config: Config) -> int:
    return min(config.inference.max_new_tokens, config.model.max_position_embeddings - 1)


def sample(trainer: Trainer) -> str:
    """A document from its very beginning, or why there is none; ends early when the run is told to
    stop. Collective."""
    tokenizer = trainer.datasets.tokenizer
    if reason := obstacle(trainer.config.parallel):
        return f"No sample from this layout: {reason}. python -m pangu.generate has one process."
    tokens = []
    request = Request(
        prompt=(tokenizer.eod,),
        max_new_tokens=_sample_length(trainer.config),
        sampling=replace(_SAMPLING, seed=trainer.config.seed),
        stop_tokens=frozenset({tokenizer.eod}),
    )
    model = unwrap_model(trainer.engine.chunks[0])
    try:
        for token in generate(model, request, tokenizer.vocab_size):
            tokens.append(token)
            if trainer.stop.agreed():
                break
    except NotFinite as error:
        return f"No sample: {error}."
    return tokenizer.decode(tokens)


def baselines(
    config: Config, datasets: Datasets, phase: schedule.Phase
) -> dict[str, dict[str, float | None]]:
    """Training and held-out loss of the unigram and the bigram model of the training tokens.

    They are counted on one pass over the training data, seen by the run or not, and judged on the
    very tokens that validation sees.
    """
    seq_length = schedule.seq_length(config, phase)
    # One pass at most: a second would let the n-grams see their tuning part.
    held = sequences_held(datasets.train, seq_length) or _MOST_TOKENS
    train = token_rows(datasets.train, min(held, _MOST_TOKENS // seq_length))
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
