"""Two real processes build the same datasets together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from configs.compose import load


def _rank(rank: int, corpora: list[str], folder: str) -> None:
    from pangu.data.datasets import batches, build_datasets, token_rows

    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    config = load(["data=indexed", f"data.cache_dir={folder}"])
    config.data.blend = {prefix: 1.0 + i for i, prefix in enumerate(corpora)}
    datasets = build_datasets(config, train_samples=48, validation_samples=8, seq_length=32)
    mine = batches(
        datasets.train,
        config,
        data_parallel_rank=rank,
        data_parallel_size=2,
        consumed_sequences=8,
        micro_batch_size=2,
    )
    np.savez(
        f"{folder}/rank{rank}.npz",
        train=token_rows(datasets.train, 48),
        validation=token_rows(datasets.validation, 8),
        mine=torch.cat([batch["tokens"] for batch in mine]).numpy(),
    )
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_see_one_order(corpus: Path, second_corpus: Path, tmp_path: Path) -> None:
    mp.spawn(_rank, ([str(corpus), str(second_corpus)], str(tmp_path)), nprocs=2)
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    assert np.array_equal(first["train"], second["train"])
    assert np.array_equal(first["validation"], second["validation"])
    # rank 0 has sequences 8 9, 12 13, … and rank 1 has 10 11, 14 15, …
    rows = first["train"][8:48, :-1].reshape(10, 2, 2, 32)
    assert np.array_equal(first["mine"][:20], rows[:, 0].reshape(20, 32))
    assert np.array_equal(second["mine"][:20], rows[:, 1].reshape(20, 32))
    # two corpora and their blend, for each of both splits; the splits' sizes differ
    assert len([path for path in (tmp_path / "index").iterdir() if path.is_dir()]) == 6
