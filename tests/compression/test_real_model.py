"""SmolLM2-135M in fewer bits, briefly; the whole ladders: `benchmarks/compression_ladder.py`."""

import math
import random
from pathlib import Path

from gloo import leave
from real_models import smollm2

from pangu.compression.quantization import Rounding, rounded, scheme_for
from pangu.compression.texts import Texts, judge
from pangu.trained_model import loaded
from pangu.weights.convert import import_model

TEXTS = Texts(Path(random.__file__), tokens=384, window=128)


def test_eight_bits_are_as_good_as_float_and_three_are_not(tmp_path):
    folder, found = tmp_path / "ours", {}
    import_model(smollm2(), folder)
    leave()
    with loaded(folder, "cpu") as trained:
        found["float"] = judge("", trained, TEXTS, iter).nats_per_token
        for scheme in ("W8A16", "W3A16"):  # one after the other, the second from the first
            grid = scheme_for(trained.model, Rounding(scheme, "rtn"))
            rounded(trained, folder, grid, "rtn", TEXTS, iter)
            found[scheme] = judge("", trained, TEXTS, iter).nats_per_token
    assert math.exp(abs(found["W8A16"] - found["float"])) < 1.02
    assert math.exp(found["W3A16"] - found["float"]) > 1.5
