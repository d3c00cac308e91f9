"""A run does not go on with data whose tokens mean something else."""

from pathlib import Path

import gloo
import pytest

from configs.compose import load
from configs.violation import ConfigError
from pangu.data.tokenizer import NumberTokenizer


def test_another_tokenizer_is_refused_by_content(tmp_path: Path) -> None:
    gloo.single()
    from pangu.checkpoint.manifest import Manifest
    from pangu.checkpoint.restore import TOKENIZER, Found, refuse_other_tokenizer

    found = Found(tmp_path, Manifest(1, {}, 1, 1, {}))
    NumberTokenizer(64).save(tmp_path / TOKENIZER)
    config = load(["data.tokenizer=elsewhere"])
    refuse_other_tokenizer(config, found, NumberTokenizer(64))
    with pytest.raises(ConfigError) as caught:
        refuse_other_tokenizer(config, found, NumberTokenizer(65))
    (violation,) = caught.value.violations
    assert violation.key == "data.tokenizer"
    assert f"data written with {tmp_path / TOKENIZER}" in violation.suggestion
    allowed = load(["checkpoint.allow_changes=[data.tokenizer]"])
    refuse_other_tokenizer(allowed, found, NumberTokenizer(65))
