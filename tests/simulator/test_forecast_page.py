"""The page of a forecast: its numbers, and that a browser draws them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
from browser import drawn, needs_browser

from configs.compose import load
from simulator.predict import predict
from simulator.report import write_report
from simulator.search import search

PLAN = [
    "model=pangu_pro_moe",
    "model.num_layers=8",
    "hardware=ascend_910b_376t",
    "devices=16",
    "train.global_batch_size=64",
    "train.seq_length=4096",
]
PIPELINE = [
    "parallel.pipeline_model_parallel_size=4",
    "parallel.expert_model_parallel_size=4",
    "parallel.virtual_pipeline_model_parallel_size=2",
]


def data_of(path):
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert not re.search(r'(src|href)=|@import|url\("?http', page)  # nothing from elsewhere
    return json.loads(page.split("const data = ")[1].split(";\n")[0])


@pytest.fixture(scope="module")
def forecast(tmp_path_factory):
    config = load([*PLAN, *PIPELINE])
    prediction = predict(config)
    path = tmp_path_factory.mktemp("page") / "forecast.html"
    write_report(path, config, prediction)
    return path, prediction


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    config = load([*PLAN, *PIPELINE])
    pinned = frozenset(line.partition("=")[0] for line in PIPELINE)
    result = search(config, pinned=pinned, top=3)
    path = tmp_path_factory.mktemp("page") / "search.html"
    best = result.choices[0]
    write_report(path, best.config, best.prediction, result)
    return path, result


def test_numbers_of_the_page(forecast):
    path, prediction = forecast
    data = data_of(path)
    assert sum(seconds for _, seconds in data["breakdown"]) == pytest.approx(data["step"])
    line = data["timeline"]
    # 4 ranks × 16 micro-batches × 2 chunks, forward and backward
    assert [len(rank) for rank in line["ranks"]] == [64] * 4
    assert (line["drawn"], line["microbatches"], line["chunks"]) == (16, 16, 2)
    assert line["end"] == pytest.approx(prediction.step_seconds, rel=0.01)
    for rank in line["ranks"]:
        assert all(a[4] <= b[3] + 1e-6 for a, b in itertools.pairwise(rank))
    peaks = [sum(row[:-1]) for row in data["memory"]["gib"]]  # buffers are outside the peak
    assert max(peaks) == pytest.approx(prediction.peak_memory_gib, abs=0.01)
    assert data["search"] is None


def test_numbers_of_a_search(found):
    path, result = found
    shown = data_of(path)["search"]
    assert len(shown["cloud"]) == min(result.fitting, 2000)
    assert len(shown["ranking"]) == 3
    assert shown["ranking"][0]["headroom"] == pytest.approx(64 - shown["ranking"][0]["peak"])
    fell_out = sum(count for _, count in shown["rejected"])
    assert fell_out + shown["fitting"] == shown["candidates"]


DRIVER = """
<script>
addEventListener("load", () => setTimeout(() => {
  const said = [];
  const move = (element, x, y, kind = "pointermove") =>
    element["on" + kind]({ clientX: x, clientY: y, pointerId: 1 });
  const svg = () => document.querySelector("#timeline svg"), tip = document.getElementById("tip");
  Element.prototype.setPointerCapture = () => {};
  const hover = (share) => {
    const box = svg().getBoundingClientRect();
    move(svg(), box.left + 62 + (box.width - 62) * share, box.top + 4);
    said.push(tip.textContent);
  };
  hover(0.001);
  const before = svg().querySelectorAll("text").length;
  const box = svg().getBoundingClientRect();
  move(svg(), box.left + 62, box.top + 4, "pointerdown");
  move(svg(), box.left + 62 + (box.width - 62) / 20, box.top + 4, "pointerup");
  said.push(String(svg().querySelectorAll("text").length !== before));
  hover(0.5);
  move(document.querySelector("#memory rect[fill=transparent]"), 9, 9);
  said.push(tip.textContent);
  const result = document.createElement("pre");
  result.id = "said";
  result.textContent = said.join(" | ").replaceAll("\\n", " / ");
  document.body.append(result);
}, 200));
</script>
"""


@pytest.mark.end_to_end
@needs_browser
@pytest.mark.parametrize("kind", ["forecast", "found"])
def test_a_browser_draws_and_answers(kind, request, tmp_path):
    path, _ = request.getfixturevalue(kind)
    driven = tmp_path / "driven.html"
    driven.write_text(path.read_text(encoding="utf-8") + DRIVER, encoding="utf-8")
    dom = drawn(driven, tmp_path / "profile")
    data = data_of(path)
    assert f"<title>{data['title']}</title>" in dom
    assert dom.count('class="memory"') == 6 * 4
    said = dom.split('<pre id="said">')[1].split("</pre>")[0].split(" | ")
    layers = 3 if kind == "found" else 2  # found: [2, 1, 1, 1, 1, 1, 1, 0], the loss apart
    assert said[0].startswith(f"rank 0, {layers} layers / forward of micro-batch 0, chunk 0")
    assert said[1] == "true"  # the zoomed schedule has other labels
    assert said[2].startswith(f"rank 0, {layers} layers / ")
    assert re.match(rf"rank 0, {layers} layers: \d+\.\d GiB / weights \d", said[3])
    expected = 3 if kind == "found" else 0
    assert dom.count('class="ranking"') == expected


@pytest.mark.end_to_end
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "simulator", "report", *PLAN, *PIPELINE]
    path = tmp_path / "page.html"
    done = subprocess.run([*command, "--out", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert data_of(path)["title"] == "pangu_pro_moe on 16 × ascend_910b_376t"
    nowhere = str(tmp_path / "no" / "page.html")
    done = subprocess.run([*command, "--out", nowhere], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"{nowhere}: No such file or directory"
