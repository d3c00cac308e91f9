"""Speculative decoding: the closed forms against counting, the times against what was published."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.compose import load
from simulator.__main__ import application
from simulator.api import decoding_seconds
from simulator.hardware import load_hardware
from simulator.inference import decode_step, forecast, memory_bytes
from simulator.moesd import (
    acceptance,
    active_experts,
    popularity_at,
    saturation_tokens,
    sigma,
    tokens_per_expert,
)
from simulator.serving import Serving, serving
from simulator.speculation import dense_twin, speculate, with_popularity, with_top_k
from simulator.speculation_fit import Fitted, Points, fit
from simulator.validation.speculation import BATCHES, published_peaks

QWEN = ["model=qwen2_57b_a14b", "hardware=a800", "devices=2", "inference.draft=qwen2_0_5b"]
QWEN += ["parallel.tensor_model_parallel_size=2", "parallel.expert_tensor_parallel_size=2"]
QWEN += ["inference.prompt_length=150", "inference.max_new_tokens=400"]


def make(*overrides: str) -> Serving:
    config = load([*QWEN, *overrides])
    return serving(config, load_hardware(config.hardware))


def routed(tokens: int, scores: np.ndarray, top_k: int, groups: int, rng) -> np.ndarray:
    """How often each expert is chosen by `tokens` tokens: the `top_k` / `groups` best of every
    group under noise that makes it successive sampling without replacement."""
    noisy = scores + rng.gumbel(size=(tokens, len(scores)))
    noisy = noisy.reshape(tokens, groups, -1)
    best = np.argsort(-noisy, axis=2)[:, :, : top_k // groups]
    best += np.arange(groups)[None, :, None] * noisy.shape[2]
    return np.bincount(best.ravel(), minlength=len(scores))


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "tokens"),
    [(60, 4, 1, 16), (64, 8, 1, 16), (8, 2, 1, 4), (64, 8, 8, 5), (64, 8, 8, 24)],
)
def test_experts_that_tokens_wake(experts: int, top_k: int, groups: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    draws = [routed(tokens, np.zeros(experts), top_k, groups, rng) for _ in range(1500)]
    woken = np.array([(counts > 0).sum() for counts in draws])
    expected = active_experts(tokens, experts, top_k)
    assert expected == pytest.approx(woken.mean(), abs=4 * woken.std() / np.sqrt(1500) + 1e-9)
    assert expected == pytest.approx(experts * (1 - ((experts - top_k) / experts) ** tokens))
    # Tokens of an expert that has any.
    each = tokens * top_k / expected
    assert tokens_per_expert(tokens, experts, top_k) == pytest.approx(each)


def test_the_paper_s_thresholds() -> None:
    assert [saturation_tokens(60, 4), saturation_tokens(64, 8), saturation_tokens(8, 2)] == [
        44,
        23,
        11,
    ]
    for experts, top_k in ((60, 4), (64, 8), (8, 2), (64, 1), (4, 4)):
        least = saturation_tokens(experts, top_k)
        assert active_experts(least, experts, top_k) >= 0.95 * experts * (1 - 1e-9)
        assert least == 1 or active_experts(least - 1, experts, top_k) < 0.95 * experts
    assert active_experts(24, 64, 8, ranks=4) == pytest.approx(active_experts(24, 64, 8) / 4)


@pytest.mark.parametrize(("groups", "top_k"), [(1, 8), (8, 8), (1, 4), (8, 16)])
def test_measured_popularity(groups: int, top_k: int) -> None:
    """Experts of a skewed router, measured at K = 8 and asked about under another K."""
    rng = np.random.default_rng(groups + top_k)
    scores = rng.normal(scale=1.2, size=64)
    measured = routed(20_000, scores, 8, groups, rng)[None] / 20_000
    chosen = popularity_at(measured, top_k, groups)
    assert chosen.reshape(groups, -1).sum(axis=1) == pytest.approx(top_k / groups)
    if top_k == 8:
        assert chosen == pytest.approx(measured)
    draws = [routed(12, scores, top_k, groups, rng) for _ in range(1500)]
    woken = np.mean([(counts > 0).sum() for counts in draws])
    assert active_experts(12, 64, top_k, chosen=chosen) == pytest.approx(woken, rel=0.03)
    assert woken < active_experts(12, 64, top_k)  # popular experts are shared


def test_sigma_is_what_enumeration_gives() -> None:
    for alpha, gamma in itertools.product((0.0, 0.3, 0.8, 1.0), (1, 2, 4)):
        expected = 0.0
        for verdicts in itertools.product((True, False), repeat=gamma):
            weight = np.prod([alpha if verdict else 1 - alpha for verdict in verdicts])
            accepted = len(list(itertools.takewhile(bool, verdicts)))
            expected += weight * (accepted + 1)  # and one of the model's own
        assert sigma(alpha, gamma) * (gamma + 1) == pytest.approx(expected)
    assert acceptance(float(sigma(0.93, 4)), 4) == pytest.approx(0.93)


def test_published_peaks() -> None:
    """Tables 1 and 2 of the paper; the host's share is fitted to the twelve peaks of 4 A800."""
    peaks = published_peaks()
    assert len(peaks) == 48
    judged = [abs(peak.error) for peak in peaks if not peak.calibrated]
    assert len(judged) == 36
    assert np.mean(judged) < 0.10
    assert max(judged) < 0.25
    best = {
        peak.hardware: peak
        for peak in peaks
        if (peak.dataset, peak.temperature, peak.draft_tokens) == ("humaneval", 0.0, 4)
        and not peak.calibrated
    }
    assert {name: peak.published for name, peak in best.items()} == {
        "a800": 2.18,
        "h800": 2.29,
        "l40": 2.25,
    }
    assert all(abs(peak.error) < 0.15 for peak in best.values()), best
    assert all(16 <= peak.batch <= 40 for peak in best.values())


@pytest.mark.parametrize("host_ms", [0, 6.5])
def test_experts_gain_more_than_a_dense_model_beyond_sixteen(host_ms: float) -> None:
    """Their target efficiency rises and falls, a dense model's falls (figures 3 and 6)."""
    sparse = make("inference.acceptance_rate=0.95", f"inference.host_ms={host_ms}")
    dense = serving(dense_twin(sparse.config), sparse.hardware)
    large = BATCHES[(BATCHES >= 16) & (BATCHES <= 64)]
    gained, compared = (speculate(each, large, 4) for each in (sparse, dense))
    assert np.all(gained.speedup > compared.speedup)
    first = speculate(sparse, np.array([1, 2, 16]), 4).target_efficiency
    assert first[1] < first[2]
    falling = speculate(dense, BATCHES, 4).target_efficiency
    assert np.all(np.diff(falling) < 0.02)
    assert falling[0] > 0.95 > 0.5 > falling[-1]


def test_opt_30b_gains_less_than_experts_beyond_sixteen() -> None:
    """The paper's own dense model (its output projection and its positions left out)."""
    shape = {"num_layers": 48, "hidden_size": 7168, "num_attention_heads": 56}
    shape |= {"num_query_groups": 56, "ffn_hidden_size": 28672, "vocab_size": 50272}
    shape |= {"num_experts": 0, "shared_expert_ffn_hidden_size": 0, "activation": "gelu"}
    opt = [f"model.{key}={value}" for key, value in shape.items()]
    opt += ["inference.draft=ngram", "parallel.expert_tensor_parallel_size=1"]
    batch = np.array([1, 32, 60])
    dense = speculate(make(*opt), batch, 4).target_efficiency
    sparse = speculate(make(), batch, 4).target_efficiency
    assert dense[0] > sparse[0]
    assert np.all(dense[1:] < sparse[1:])


def test_sparser_models_peak_later_and_wake_more_at_first() -> None:
    """K = 1 and 2 lose as the first batches grow (figure 4); the paper measured them falling
    throughout, here they recover once all experts are awake."""
    layout = make("inference.acceptance_rate=0.95")
    curves = {
        k: speculate(serving(with_top_k(layout.config, k), layout.hardware), BATCHES, 4).speedup
        for k in (1, 2, 4, 8, 16)
    }
    peaks = [int(BATCHES[np.argmax(curves[k])]) for k in (2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)
    assert np.all(np.diff(curves[1][:5]) < 0)  # batches 1 to 12
    assert np.argmax(curves[1]) == 0
    assert np.all(np.diff(curves[2][:4]) < 0)  # 1 to 8


def test_a_serving_forecast_is_plain_decoding_times_the_speedup() -> None:
    for draft in ("ngram", "mtp", "qwen2_0_5b"):
        more = [f"inference.draft={draft}", "inference.draft_tokens=3", "model.mtp_num_layers=1"]
        layout = make(*more, "inference.host_ms=2")
        one = speculate(layout, 24, 3)
        served = forecast(layout, 24)
        assert served.tpot_seconds == pytest.approx(float(one.plain) / float(one.speedup))
        assert served.decode.parts["host"] == 0.002
    assert np.all(speculate(make("inference.draft=ngram"), 24, 3).draft == 0)


def test_a_drafting_model_runs_on_each_device_for_its_share() -> None:
    layout = make("inference.draft_tokens=4")
    assert layout.draft is not None
    assert layout.draft.devices == 1
    half = decode_step(layout.draft, 12, 350.0).seconds
    assert speculate(layout, 24, 4).draft == pytest.approx(half, rel=0.1)
    without = make("inference.draft=ngram", "inference.draft_tokens=4")
    held = memory_bytes(layout, 24) - memory_bytes(without, 24)
    weights = 2 * 0.494e9  # bytes of Qwen2-0.5B, whole on every device
    assert held == pytest.approx(weights + memory_bytes(layout.draft, 12) - weights, rel=0.01)
    assert held > weights


def test_popular_experts_make_verifying_cheaper() -> None:
    layout = make()
    chosen = np.tile(8 * np.r_[np.full(16, 0.05), np.full(48, 0.2 / 48)], (2, 1))
    skewed = with_popularity(layout, chosen)
    even = with_popularity(layout, np.full((2, 64), 1 / 8))
    same = speculate(layout, BATCHES, 4)
    assert speculate(even, BATCHES, 4).verify == pytest.approx(same.verify, rel=1e-3)
    assert np.all(speculate(skewed, 4, 4).verify < same.verify[2])


def test_one_function_gives_the_time_of_a_step() -> None:
    layout = make()
    batch, tokens = np.arange(1, 5)[:, None], np.array([1, 5])
    table = decoding_seconds(layout.config, batch, tokens, context=350)
    assert table.shape == (4, 2)
    assert table[2, 1] == decode_step(layout, 3, 350, 5).seconds
    assert decoding_seconds(layout.config, 3) == decode_step(layout, 3, 150 + 200).seconds


def synthetic(beside: int) -> tuple[Fitted, Points]:
    """228 points as the paper's: six numbers of experts, two lengths, nineteen batches."""
    true = Fitted(64, 153, 9, 2, 0.5, 0.5, 0.5, 0.1, 0.3, 0.01, 0.8, 1.01, beside)
    grid = itertools.product((1, 2, 4, 8, 16, 32), (2, 4), BATCHES)
    top_k, length, batch = (np.array(column, dtype=float) for column in zip(*grid, strict=True))
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(batch))
    speedup = np.asarray(true.speedup(batch, length, top_k, 0.9)) * noise
    used = np.zeros(len(batch), dtype=bool)
    used[::11] = True
    return true, Points(batch, length, top_k, np.full(len(batch), 0.9), speedup, used)


@pytest.mark.parametrize("beside", [0, 1])
def test_ten_parameters_from_21_of_228_points(beside: int) -> None:
    true, points = synthetic(beside)
    found = fit(points, 64, true.ridge)
    assert (found.used, found.points, found.model.beside) == (21, 228, beside)
    assert found.mse_used < 1e-3
    assert found.mse_others is not None
    assert found.mse_others < 0.01
    assert found.mean_error < 0.02


def run(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(application(["speculate"]), ["speculate", *arguments])


def test_the_command(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, points = synthetic(1)
    table = tmp_path / "points.csv"
    lines = ["batch,draft_tokens,top_k,sigma,speedup"]
    lines += [",".join(f"{value:g}" for value in row) for row in zip(*points[:5], strict=True)]
    table.write_text("\n".join(lines))
    load_file = tmp_path / "expert_load.json"
    counts = {str(layer): [5, *[3] * 63] for layer in (1, 2)}
    load_file.write_text(json.dumps({"num_groups": 1, "counts": counts}))
    plot = tmp_path / "plot.svg"
    shared = [line for line in QWEN if not line.startswith(("parallel.", "hardware="))]
    done = run(*shared, "hardware=h800,l40", "devices=4", "--top-k", "4,8", "--batch", "1,16",
               "--fit", str(table), "--popularity", str(load_file), "--plot", str(plot),
               "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    found = [(each["hardware"], each["top_k"]) for each in said["curves"]]
    assert found == [("h800", 4), ("h800", 8), ("l40", 4), ("l40", 8)]
    assert [each["hardware"] for each in said["dense"]] == ["h800", "l40"]
    one = said["curves"][1]
    assert one["saturation_tokens"] == 23
    row = one["rows"][1]
    kept = row["sigma"] * 5 * row["plain_ms"]
    round_ms = 4 * row["draft_ms"] + row["verify_ms"] + row["rejection_ms"]
    assert row["speedup"] == pytest.approx(kept / round_ms)
    assert row["target_efficiency"] == pytest.approx(row["plain_ms"] / row["verify_ms"])
    assert row["fitted_speedup"] > 1
    assert one["peak"]["speedup"] == max(each["speedup"] for each in one["rows"])
    assert said["fit"]["used"] == 21
    assert plot.read_text().startswith("<?xml")
    plain = run(*QWEN[:-2], "--draft-tokens", "2")
    assert plain.exit_code == 0
    assert "target efficiency" in plain.stdout


WRONG = {
    "--top-k=0": "--top-k=0: must be FROM:TO:STEP",
    "--top-k=65": "--top-k=65: must be from 1 to the 64 experts",
    "--batch=x": "--batch=x: must be FROM:TO:STEP",
    "--batch=1:999999999": "--batch=1:999999999: must be",
    "--batch=99999999": "--batch=99999999: must be at most",
    "--draft-tokens=-1": "--draft-tokens=-1: must be",
    "--fit=nowhere.csv": "--fit=nowhere.csv: cannot be read",
    "--fit=bad.csv": "--fit=bad.csv: lacks the column",
    "--fit=few.csv": "--fit=few.csv: gives 2 points",
    "--popularity=nowhere.json": "--popularity=nowhere.json: cannot be read",
    "--popularity=bad.csv": "--popularity=bad.csv: is not the expert_load.json",
    "--popularity=small.json": "--popularity=small.json: has 4 experts, the model 64",
    "--plot=x.gif": "--plot=x.gif: ends with one of",
    "inference.draft=none": "inference.draft=none: is not mtp, ngram, or a model",
    "inference.draft=pangu_pro_moe": "inference.draft=pangu_pro_moe: has 153376 tokens",
    "inference.acceptance_rate=2": "inference.acceptance_rate=2.0: must be at most 1",
    "inference.host_ms=nan": "inference.host_ms=nan: must be finite",
    "devices=1": "devices=1: ",
}


@pytest.mark.parametrize(("argument", "sentence"), WRONG.items())
def test_wrong_arguments_are_one_sentence(argument: str, sentence: str, tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    row = "4,4,8,0.9,2\n"
    (tmp_path / "few.csv").write_text("batch,draft_tokens,top_k,sigma,speedup\n" + 2 * row)
    (tmp_path / "small.json").write_text(json.dumps({"counts": {"1": [1, 2, 3, 4]}}))
    layout = [line for line in QWEN if not line.startswith("parallel.")]
    done = run(*(layout if argument == "devices=1" else QWEN), argument)
    assert done.exception is not None
    assert str(done.exception).startswith(sentence), done.exception
    assert "\n" not in str(done.exception)


def test_a_mistake_ends_with_exit_code_two() -> None:
    command = [sys.executable, "-m", "simulator", "speculate", *QWEN, "--top-k=99"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "--top-k=99: must be from 1 to the 64 experts"
    moge = load(["model=pangu_pro_moe", "hardware=h800"])
    assert with_top_k(moge, 16).moe.top_k == 16
    with pytest.raises(ValueError, match="multiple of the 8 groups"):
        with_top_k(moge, 12)
    with pytest.raises(ValueError, match="has no experts"):
        with_top_k(replace(moge, model=replace(moge.model, num_experts=0)), 1)
