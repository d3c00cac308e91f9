"""Plots and page of a run folder with known numbers."""

import json
import subprocess
import sys
from urllib.request import urlopen

import numpy as np
import pytest
from browser import drawn, needs_browser

from configs.compose import load, to_yaml
from pangu.report.__main__ import main
from pangu.report.page import write_page
from pangu.report.plots import load_figure, loss_figure, smooth, write_plots
from pangu.report.run_data import read_run
from pangu.report.run_files import ExpertLoad, perplexity
from pangu.report.summary import print_summary

COUNTS = {
    1: [10] * 16,
    2: [0, 20, 10, 10, *[10] * 12],
}
SAMPLE = "print('</script><b>&amp;')\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "first run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load(["experiment=quickstart"])))
    rows = [
        {"step": step, "loss": 8 - step / 10, "tokens": 2048, "grad_norm": 1.0, "mfu": 0.4}
        for step in range(1, 41)
    ]
    rows[4]["loss"] = None  # skipped
    rows.insert(20, {"step": 20, "validation_loss": 6.5})
    rows.append({"step": 40, "validation_loss": 4.25})
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    losses = {"training": 3.5, "held_out": 4.5}, {"training": 6.0, "held_out": None}
    baselines = dict(zip(("bigram", "unigram"), losses, strict=True))
    (folder / "baselines.json").write_text(json.dumps(baselines))
    (folder / "sample.txt").write_text(SAMPLE)
    ExpertLoad(21, 40, 4, COUNTS).write(folder / "expert_load.json")
    return folder


def page_data(folder):
    page = write_page(read_run(folder)).read_text()
    assert page.count("</script>") == 1  # the sample closes nothing
    assert "src=" not in page
    assert "@import" not in page
    return json.loads(page.split("const run = ")[1].split(";\n")[0])


def test_summary_prints_no_control_characters(folder, capsys):
    """An untrained model makes all kinds of bytes; they must not clear or colour the terminal."""
    (folder / "sample.txt").write_text("\x1b[2Jdef f():\n\treturn \x07'ü'\x9b", encoding="utf-8")
    print_summary(read_run(folder), [folder / "loss.png"])
    shown = capsys.readouterr().out
    assert "\ufffd[2Jdef f():" in shown
    assert "return \ufffd'ü'\ufffd" in shown
    assert "loss.png" in shown


def test_losses_are_recent_training_and_last_held_out(folder):
    model, bigram, unigram = read_run(folder).losses()
    assert model.training == pytest.approx(np.mean([8 - step / 10 for step in range(21, 41)]))
    assert (model.held_out, bigram.held_out, unigram.held_out) == (4.25, 4.5, None)
    assert bigram.cells() == ["3.500", "33.1", "4.500", "90.0"]
    assert unigram.cells() == ["6.000", "403.4", "–", "–"]
    assert perplexity(2000.0).startswith("1")  # no overflow


def test_loss_plot_shows_every_number(folder):
    axes = loss_figure(read_run(folder)).axes[0]
    raw, smoothed, held_out, bigram = axes.lines
    steps, values = raw.get_data()
    assert steps.tolist() == list(range(1, 41))
    assert np.isnan(values[4])
    assert values[39] == 4.0
    assert smoothed.get_ydata()[0] == 7.9
    assert [*zip(*held_out.get_data(), strict=True)] == [(20, 6.5), (40, 4.25)]
    assert set(bigram.get_ydata()) == {4.5}


def test_heat_map_is_relative_to_an_even_share_with_groups_marked():
    figure = load_figure(ExpertLoad(21, 40, 4, COUNTS), "run")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown[0].tolist() == [1.0] * 16
    assert shown[1].tolist() == [0.0, 2.0, *[1.0] * 14]
    *boundaries, dead = axes.lines
    assert [*zip(*dead.get_data(), strict=True)] == [(0, 1)]  # expert 0 of the second row
    assert [line.get_xdata()[0] for line in boundaries] == [3.5, 7.5, 11.5]


def test_the_bias_is_drawn_below_the_load():
    biases = {1: [0.0] * 16, 2: [0.5, -0.25, *[0.0] * 14]}
    figure = load_figure(ExpertLoad(21, 40, 4, COUNTS, biases), "run")
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    assert shown[1].get_array().tolist() == list(biases.values())
    assert (shown[1].norm.vmin, shown[1].norm.vcenter, shown[1].norm.vmax) == (-0.5, 0.0, 0.5)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "balancing bias after step 40" in titles


def rewrite(folder, overrides, rows):
    """The run with another configuration and other metrics."""
    (folder / "config.yaml").write_text(to_yaml(load(["experiment=quickstart", *overrides])))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def routed(step, **more):
    values = {"aux_loss": 1.0, "device_imbalance": 0.25, "expert_imbalance": 0.5}
    return {"step": step, "loss": 5.0, "tokens": 8, **values, **more}


def test_groups_are_named_where_the_router_has_some(folder):
    assert "moge, 4 of 16 experts in 4 groups" in page_data(folder)["subtitle"]
    top_k = ["moe.router=top_k", "moe.num_expert_groups=4"]
    rewrite(folder, top_k, [routed(1)])
    assert page_data(folder)["subtitle"].endswith("top_k, 4 of 16 experts")


def test_what_can_only_be_flat_is_not_drawn(folder):
    one_rank = ["launch.processes=1", "parallel.expert_model_parallel_size=1"]
    rewrite(folder, [*one_rank, "moe.aux_loss_coefficient=0"], [routed(1), routed(2)])
    data = page_data(folder)
    assert sorted(data["curves"]) == ["expert_imbalance"]
    assert next(note for _, note in data["tiles"]) == "expert imbalance, 0 to 1"


def test_imbalances_have_units_and_ranges(folder):
    two_ranks = ["launch.processes=2", "parallel.expert_model_parallel_size=2"]
    rewrite(folder, two_ranks, [routed(1), routed(2)])
    data = page_data(folder)
    assert {"aux_loss", "device_imbalance", "expert_imbalance"} <= data["curves"].keys()
    assert data["curves"]["device_imbalance"]["note"] == (
        "(most − least token–expert pairs of one device) / tokens: 0 is even, 4 the most"
    )
    assert data["curves"]["expert_imbalance"]["note"].endswith("0 is even, 1 the most")
    assert ["0.25", "device imbalance, 0 to 4"] in data["tiles"]


def test_a_rate_leaves_out_steps_that_share_the_machine(folder):
    rate = "tokens_per_second_per_device"
    rows = [routed(step, **{rate: 100.0}) for step in range(1, 31)]
    for step, beside in ((10, "save"), (11, "save"), (21, "validation")):
        rows[step - 1] |= {rate: 40.0, "beside": beside}
    rewrite(folder, [], rows)
    data = page_data(folder)
    steps, rates = zip(*data["curves"][rate]["points"], strict=True)
    assert set(range(1, 31)) - set(steps) == {10, 11, 21}
    assert set(rates) == {100.0}
    assert data["curves"][rate]["note"].startswith("Without steps beside the writing")
    assert len(data["curves"]["expert_imbalance"]["points"]) == 30
    assert ["100", "tokens/s per device"] in data["tiles"]
    for row in rows:  # nothing else is there to show
        row["beside"] = "save"
    rewrite(folder, [], rows)
    assert len(page_data(folder)["curves"][rate]["points"]) == 30


def test_smoothing_is_a_centred_mean_that_ignores_skipped_steps():
    values = np.arange(100.0) ** 2
    values[10] = np.nan
    smoothed = smooth(values)  # two steps on either side
    assert smoothed[0] == (0 + 1 + 4) / 3
    assert smoothed[1] == (0 + 1 + 4 + 9) / 4
    assert smoothed[50] == np.mean(np.arange(48, 53) ** 2)
    assert smoothed[10] == (64 + 81 + 121 + 144) / 4
    assert smoothed[99] == np.mean(np.arange(97, 100) ** 2)
    assert np.isnan(smooth(np.array([np.nan]))).all()


def test_the_page_holds_the_numbers(folder):
    data = page_data(folder)
    assert data["subtitle"].startswith("moge_tiny: 2.11M parameters, 927K active · 40 of 900 ")
    assert data["loss"][:6] == [7.9, 7.8, 7.7, 7.6, None, 7.4]
    assert data["validation"] == [[20, 6.5], [40, 4.25]]
    assert data["baselines"] == {"bigram": 4.5, "unigram": None}
    assert ["0.25", "nats below a bigram model"] in data["tiles"]
    assert ["40.0%", "MFU, active parameters"] in data["tiles"]
    assert data["load"]["values"][1][:3] == [0.0, 2.0, 1.0]
    assert data["sample"] == SAMPLE
    assert data["config"]["moe"]["num_expert_groups"] == 4


def test_a_long_run_is_thinned_out_but_keeps_its_end(folder):
    rows = [{"step": step, "loss": 1.0, "tokens": 8} for step in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = page_data(folder)
    assert len(data["steps"]) <= 1500
    assert (data["steps"][0], data["steps"][-1]) == (1, 5000)


@needs_browser
def test_a_browser_draws_the_page(folder, tmp_path):
    dom = drawn(write_page(read_run(folder)), tmp_path / "profile")
    assert "<td>moge_tiny</td><td>4.950</td>" in dom
    assert dom.count("<svg") == 3  # loss, gradient norm, MFU
    assert "Expert load, steps 21–40 (4 groups)" in dom
    assert "2 × an even share" in dom  # written while the heat map is drawn
    assert "print('&lt;/script&gt;&lt;b&gt;&amp;amp;')" in dom


def test_a_run_without_experts_validation_or_baselines_is_reported_too(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "tokens": 8}\n')
    for name in ("baselines.json", "expert_load.json", "sample.txt"):
        (folder / name).unlink()
    assert [path.name for path in write_plots(read_run(folder))] == ["loss.png"]
    data = page_data(folder)
    assert data["table"] == [["moge_tiny", "5.000", "148.4", "–", "–"]]
    assert data["load"] is None


def test_the_command_writes_everything_and_says_where(folder, capsys):
    assert main([str(folder)]) == 0
    names = ["loss.png", "expert_load.png", "report.html"]
    assert capsys.readouterr().out.split("\n")[:-1] == [str(folder / name) for name in names]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_one_sentence_and_exit_code_2(folder, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no run folder: it has no config.yaml\n" in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    assert main([str(folder)]) == 2
    assert "has no step in metrics.jsonl yet" in capsys.readouterr().err
    assert main([]) == 2


def test_a_report_does_not_wait_for_torch():
    code = "import sys, pangu.report.__main__, pangu.report.page; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_served_page_follows_the_run(folder):
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_bytes()
    metrics.write_bytes(b"")
    command = [sys.executable, "-m", "pangu.report", str(folder), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[0]

        def get(path: str) -> str:
            with urlopen(address + path, timeout=60) as answer:
                return answer.read().decode()

        assert "has no step in metrics.jsonl yet" in get("")
        before = get("news")
        metrics.write_bytes(rows)
        assert get("news") != before
        page = get("")
        assert '"refresh": 3' in page
        assert "40 of 900 steps" in page
        process.terminate()
    assert not (folder / "report.html").exists(), "serving writes nothing"
