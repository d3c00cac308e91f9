"""What the training loop sees: order, masks, resumption, blending."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.compose import load
from configs.schema import Config
from configs.violation import ConfigError
from pangu.data import DataError
from pangu.data.datasets import Datasets, batches, build_datasets, token_rows
from pangu.data.index_file import read_structure
from pangu.data.indexed import SequenceConfig, SequenceDataset
from pangu.data.tokenizer import load_tokenizer

SEQ = 32


def config_of(corpus: Path, tmp_path: Path, *more: str) -> Config:
    config = load(["data=indexed", f"data.cache_dir={tmp_path}", *more])
    config.data.blend = {str(corpus): 1.0}
    return config


def build(config: Config, train: int = 64, validation: int = 16) -> Datasets:
    return build_datasets(
        config, train_samples=train, validation_samples=validation, seq_length=SEQ
    )


def global_order(
    dataset: object, config: Config, dp: int, mbs: int, consumed: int, steps: int, gbs: int
) -> torch.Tensor:
    """Tokens of `steps` global batches put together from every replica, `[steps * gbs, seq]`."""
    replicas = [
        batches(
            dataset,
            config,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            consumed_sequences=consumed,
            micro_batch_size=mbs,
        )
        for rank in range(dp)
    ]
    rows = []
    for _ in range(steps * gbs // (dp * mbs)):
        rows += [next(replica)["tokens"] for replica in replicas]
    return torch.cat(rows)


def test_sequences_are_whole_documents_in_order(corpus: Path, tmp_path: Path) -> None:
    """One epoch holds every training token but the cut-off tail, each sequence a real stretch."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    config = config_of(corpus, tmp_path)
    datasets = build(config, train=1)
    tokens = read_structure(corpus / "train").tokens
    assert len(datasets.train) == (tokens - 1) // SEQ
    rows = token_rows(datasets.train, len(datasets.train))
    source = IndexedDataset(str(corpus / "train"))
    documents = [" ".join(map(str, document)) for document in source[:]]
    eod = datasets.tokenizer.eod
    for row in rows:
        pieces = f" {' '.join(map(str, row))} ".split(f" {eod} ")
        assert all(any(piece.strip() in document for document in documents) for piece in pieces)
    # shuffled: one sequence does not go on where the one before ended
    assert (rows[:-1, -1] == rows[1:, 0]).mean() < 0.4
    # the label of a sequence's end is the input that its continuation starts with, so that all
    # inputs together are the corpus up to its last tokens
    counts = np.bincount(rows[:, :-1].ravel(), minlength=300)
    everything = np.bincount(np.concatenate(source[:]), minlength=300)
    assert (everything - counts >= 0).all()
    assert (everything - counts).sum() == tokens - len(rows) * SEQ


def test_labels_are_the_next_tokens(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    datasets = build(config)
    batch = next(
        batches(
            datasets.train,
            config,
            data_parallel_rank=0,
            data_parallel_size=1,
            consumed_sequences=0,
            micro_batch_size=4,
        )
    )
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }
    assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(4, SEQ))
    assert batch["loss_mask"].eq(1).all()


@pytest.mark.parametrize(("dp", "mbs"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_order_does_not_depend_on_the_layout(
    corpus: Path, tmp_path: Path, dp: int, mbs: int
) -> None:
    config = config_of(corpus, tmp_path)
    dataset = build(config).train
    steps, gbs = 5, 8
    expected = torch.from_numpy(token_rows(dataset, steps * gbs)[:, :-1])
    assert torch.equal(global_order(dataset, config, dp, mbs, 0, steps, gbs), expected)
    # resumed after three steps in this layout
    assert torch.equal(global_order(dataset, config, dp, mbs, 24, 2, gbs), expected[24:])


def test_replicas_end_together(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    dataset = build(config).train
    consumed = len(dataset) - 7
    counts = [
        sum(
            1
            for _ in batches(
                dataset,
                config,
                data_parallel_rank=rank,
                data_parallel_size=2,
                consumed_sequences=consumed,
                micro_batch_size=1,
            )
        )
        for rank in range(2)
    ]
    assert counts == [3, 3]


def test_reading_leaves_the_random_state_alone(corpus: Path, tmp_path: Path) -> None:
    """A resumed run makes its iterator anew and must draw the same numbers after that."""
    config = config_of(corpus, tmp_path)
    before = torch.get_rng_state()
    global_order(build(config).train, config, 1, 4, 0, 2, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_batches(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    dataset = build(config).train
    expected = global_order(dataset, config, 1, 4, 0, 4, 8)
    config.data.num_workers = 1
    assert torch.equal(global_order(dataset, config, 1, 4, 0, 4, 8), expected)


def test_order_depends_on_the_seed_alone(corpus: Path, tmp_path: Path) -> None:
    """Training longer goes on through the same data; another seed takes another way; validation
    sees the same sequences whatever the seed."""
    short = build(config_of(corpus, tmp_path), train=8)
    epoch = len(short.train)
    longer = build(config_of(corpus, tmp_path), train=3 * epoch - 5)
    assert len(longer.train) == 3 * epoch
    rows = token_rows(longer.train, 3 * epoch)
    assert np.array_equal(rows[:epoch], token_rows(short.train, epoch))
    assert not np.array_equal(rows[:epoch], rows[epoch : 2 * epoch])
    other = build(config_of(corpus, tmp_path, "seed=7"))
    assert not np.array_equal(token_rows(other.train, 16), rows[:16])
    assert np.array_equal(token_rows(other.validation, 16), token_rows(short.validation, 16))


def test_a_corpus_written_anew_gets_a_new_index(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    first = build(config_of(folder, tmp_path))
    for suffix in (".bin", ".idx"):
        (folder / f"train{suffix}").write_bytes((corpus / f"validation{suffix}").read_bytes())
    second = build(config_of(folder, tmp_path), train=1)
    assert len(second.train) == (read_structure(corpus / "validation").tokens - 1) // SEQ
    assert len(second.train) < len(first.train)


def document_sample(corpus: Path, tmp_path: Path, **options: bool) -> dict[str, torch.Tensor]:
    """A sequence `a b <eod> c d <eod> e` (and the label f) as the dataset returns it."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    prefix = str(tmp_path / "tiny")
    tokenizer = load_tokenizer(corpus)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.array([5, 6, tokenizer.eod, 7, 8, tokenizer.eod, 9, 10]), [8])
    builder.finalize(f"{prefix}.idx")
    defaults = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = SequenceConfig(
        random_seed=0,
        sequence_length=7,
        blend_per_split=[([prefix], None), None, None],
        tokenizer=tokenizer,
        create_attention_mask=False,
        index_dir=str(tmp_path / "index"),
        vocab_size=300,
        **(defaults | options),
    )
    return SequenceDataset(
        IndexedDataset(prefix), prefix, np.arange(1, dtype=np.int32), 1, Split.train, config
    )[0]


def test_document_masks(corpus: Path, tmp_path: Path) -> None:
    plain = document_sample(corpus, tmp_path)
    assert plain["tokens"].tolist() == [5, 6, 0, 7, 8, 0, 9]
    assert plain["labels"].tolist() == [6, 0, 7, 8, 0, 9, 10]
    assert "document_ids" not in plain
    sample = document_sample(
        corpus, tmp_path, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True
    )
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert sample["document_ids"].dtype == torch.int32
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 1, 0, 1]


def test_blending_follows_the_weights(corpus: Path, second_corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    config.data.blend = {str(corpus): 3.0, str(second_corpus): 1.0}
    datasets = build(config, train=400, validation=40)
    assert len(datasets.train) >= 400
    for dataset, count in ((datasets.train, 400), (datasets.validation, 40)):
        rows = token_rows(dataset, count)
        # the second corpus is digits and spaces
        text = [datasets.tokenizer.decode([t for t in row if t]) for row in rows]
        numbers = [all(c.isdigit() or c in " \ufffd" for c in line) for line in text]
        assert sum(numbers) == pytest.approx(count / 4, abs=1)
        # at every point of the run, not on average only
        assert np.abs(np.cumsum(numbers) - np.arange(1, count + 1) / 4).max() <= 1.5
    config.data.blend_by = "documents"
    rows = token_rows(build(config, train=2000).train, 2000)
    # A document's end is counted with the corpus that it came from.
    ends = [[t for t in row if t == datasets.tokenizer.eod] for row in rows]
    text = [datasets.tokenizer.decode([t for t in row if t]) for row in rows]
    second = [all(c.isdigit() or c in " \ufffd" for c in line) for line in text]
    of_second = sum(len(row) for row, is_second in zip(ends, second, strict=True) if is_second)
    assert of_second / sum(map(len, ends)) == pytest.approx(0.25, abs=0.03)
    config.data.blend_by = "tokens"
    longer = build(config, train=500)
    assert np.array_equal(token_rows(longer.train, 400), token_rows(datasets.train, 400))


def test_synthetic_tokens(tmp_path: Path) -> None:
    config = load(["data=synthetic", "seed=3"])
    datasets = build(config)
    rows = token_rows(datasets.train, 64)
    assert rows.shape == (64, SEQ + 1)
    assert rows.min() >= 0
    assert rows.max() < config.model.vocab_size
    assert np.array_equal(rows, token_rows(build(config).train, 64))
    assert not np.array_equal(rows[:16], token_rows(datasets.validation, 16))
    datasets.tokenizer.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == config.model.vocab_size
    assert tokenizer.encode(tokenizer.decode([5, 17])) == [5, 17]


def test_every_damaged_file_is_named(corpus: Path, tmp_path: Path) -> None:
    for name in ("short", "headless", "stub", "fine"):
        folder = tmp_path / name
        folder.mkdir()
        for path in corpus.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    short = tmp_path / "short" / "train.bin"
    short.write_bytes(short.read_bytes()[:-100])
    (tmp_path / "headless" / "train.idx").write_bytes(b"MMIDIDX\0\0")
    stub = tmp_path / "stub" / "train.idx"
    stub.write_bytes(stub.read_bytes()[:-8])
    config = config_of(corpus, tmp_path)
    names = ("fine", "short", "headless", "stub", "absent")
    config.data.blend = {str(tmp_path / name): 1.0 for name in names}
    config.model.vocab_size = 100
    with pytest.raises(ConfigError) as caught:
        build(config)
    text = str(caught.value)
    assert f"{short} has {short.stat().st_size} bytes where its index counts" in text
    assert f"{tmp_path / 'headless' / 'train.idx'} is not a Megatron index" in text
    assert f"{stub} was cut short: {stub.stat().st_size} bytes instead of" in text
    assert f"there is no file {tmp_path / 'absent'}.bin" in text
    assert "model.vocab_size=100: the corpus' tokenizer has 300 tokens" in text
    assert len(caught.value.violations) == 5
    config.data.blend = {str(tmp_path / "nowhere" / "absent"): 1.0}
    with pytest.raises(ConfigError) as caught:
        build(config)
    (violation,) = caught.value.violations
    assert violation.key == "data.blend", "the corpus, not the tokenizer that would be beside it"


def test_corpora_of_different_tokenizers_are_not_blended(
    corpus: Path, foreign_corpus: Path, tmp_path: Path
) -> None:
    config = config_of(corpus, tmp_path)
    config.data.blend[str(foreign_corpus)] = 1.0
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert [str(violation) for violation in caught.value.violations] == [
        f"data.blend={foreign_corpus / part}: it was written with another tokenizer than "
        f"{corpus / 'train'}"
        for part in ("train", "validation")
    ]


def test_a_corpus_shorter_than_a_sequence_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not fill one sequence of 1000000"):
        build_datasets(
            config_of(corpus, tmp_path),
            train_samples=1,
            validation_samples=1,
            seq_length=1_000_000,
        )


def test_validating_without_held_out_files_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train-only"
    folder.mkdir()
    for path in (*corpus.glob("train.*"), *corpus.glob("tokenizer*")):
        (folder / path.name).write_bytes(path.read_bytes())
    config = config_of(folder, tmp_path)
    with pytest.raises(ConfigError, match=r"validation_blend=\{\}: .*or train\.validate_every=0"):
        build(config)
    config.train.validate_every = 0
    assert build(config).validation is None
    config.train.validate_every = 10
    config.data.validation_blend = {str(corpus / "validation"): 1.0}
    assert len(build(config).validation) >= 16


def test_tokens_beyond_the_vocabulary_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    datasets = build(config)
    datasets.train.config.vocab_size = 40
    sentence = r"^\S+train\.bin holds token \d+, but model\.vocab_size is 40: [^\n]*$"
    with pytest.raises(DataError, match=sentence):
        list(map(datasets.train.__getitem__, range(8)))
    for workers in (0, 1):
        config.data.num_workers = workers
        with pytest.raises(DataError, match=sentence):
            global_order(datasets.train, config, 1, 4, 0, 2, 4)


def test_negative_tokens_are_refused(corpus: Path, tmp_path: Path) -> None:
    """The engine takes -1 for padding: it would train on token 0 there, without a loss."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "negative"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    tokens = np.arange(2 * SEQ)
    tokens[SEQ // 2] = -1
    builder.add_document(tokens, [tokens.size])
    builder.finalize(f"{prefix}.idx")
    config = config_of(corpus, tmp_path, f"data.tokenizer={corpus}", "train.validate_every=0")
    config.data.blend = {str(prefix): 1.0}
    datasets = build(config, train=1, validation=0)
    with pytest.raises(DataError, match=r"negative\.bin holds token -1: it is damaged"):
        token_rows(datasets.train, 1)
