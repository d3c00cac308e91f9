"""What `pangu.data.inspect` says about corpora whose content is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from typer.testing import CliRunner

from pangu.data import inspect
from pangu.data.inspect import app, heat_line


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_a_prepared_corpus(corpus: Path) -> None:
    code, text = run(corpus, "--samples", 2)
    assert code == 0, text
    source = IndexedDataset(str(corpus / "train"))
    tokens = np.concatenate([source[i] for i in range(len(source))])
    lengths = sorted(source.sequence_lengths)
    train, validation = text.split(f"{corpus / 'validation'}: ")
    assert f"{corpus / 'train'}: {len(lengths)} documents, {len(tokens):,} tokens (uint16)" in train
    assert f"shortest {lengths[0]}, " in train
    assert f"longest {lengths[-1]:,}, mean {np.mean(lengths):,.1f}" in train
    assert f"ids in use: {len(np.unique(tokens))} of 300\n" in train
    assert train.count("  document ") == validation.count("  document ") == 2
    assert "tokens): " in train
    assert any(word in train for word in (" expert ", " token ", " layer "))
    (top,) = (line for line in train.splitlines() if "most frequent" in line)
    assert f" {np.bincount(tokens).max() / len(tokens):.1%}" in top


def test_files_of_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of several sequences; no tokenizer; more tokens than are counted."""
    prefix = tmp_path / "some"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.array([5, 5, 5, 5, 7, 9]), [4, 2])
    builder.add_document(np.array([5, 9]), [1, 1])
    builder.finalize(f"{prefix}.idx")
    code, text = run(prefix, "--samples", 0)
    assert code == 0, text
    assert f"{prefix}: 2 documents, 8 tokens (int32)\n" in text
    assert "shortest 2, 10 % 2, median 4, 90 % 5, longest 6, mean 4.0" in text
    assert "ids in use: 3 of 10\n" in text
    assert "most frequent: 5 62.5%, 9 25.0%, 7 12.5%\n" in text
    monkeypatch.setattr(inspect, "COUNTED", 4)
    monkeypatch.setattr(inspect, "_BLOCK", 2)
    assert "in 4 tokens taken evenly" in run(prefix, "--samples", 0)[1]
    code, text = run(prefix)
    assert code == 2
    assert f"error: {tmp_path} holds no tokenizer" in text
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[3] ^= 128
    Path(f"{prefix}.bin").write_bytes(content)
    code, text = run(prefix, "--samples", 0)
    assert code == 2
    assert f"error: {prefix}.bin holds token -2147483643" in text
    assert run(tmp_path / "absent")[0] == 2


def test_the_heat_line() -> None:
    assert heat_line(np.array([0, 1, 4, 128])) == " ▁▃█"
    assert heat_line(np.array([0, 0, 128, 0])) == "  █ "
    wide = np.zeros(inspect.WIDTH * 3 - 1, int)
    wide[3:6] = 2
    assert heat_line(wide) == " █" + " " * (inspect.WIDTH - 2)
