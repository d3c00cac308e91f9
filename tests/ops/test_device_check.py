"""The doctor's check of a device: right operators hold, wrong ones and failing ones are named."""

from importlib.metadata import version

import torch

from pangu import device_check
from pangu.ops.cases import TOLERANCES, cases, compared


def test_every_operator_of_this_machine_holds():
    outcomes = [compared(case, dtype) for case in cases() for dtype in TOLERANCES]
    assert len(outcomes) == 30
    assert [outcome for outcome in outcomes if not outcome.holds] == []


def test_a_wrong_gradient_and_a_missing_kernel_are_found():
    case = next(case for case in cases() if case.name == "swiglu")

    def without_gradient_of_the_weights(x, weights):
        return case.run(x, weights.detach()) + 0 * weights[:, None]

    def missing(x, weights):
        raise NotImplementedError("no kernel\nand where to look for one")

    wrong = compared(case._replace(run=without_gradient_of_the_weights), torch.float32)
    assert not wrong.holds
    assert wrong.error == 1
    absent = compared(case._replace(run=missing), torch.float32)
    assert not absent.holds
    assert absent.raised == "no kernel"


def test_steps_that_differ_end_in_failure(capsys):
    off = [(1, "loss", 6.95, 6.95), (2, "loss", 6.94, 6.90)]
    assert device_check._show_steps("fp32", [(1, "loss", 6.95, 6.9501)])
    assert not device_check._show_steps("fp32", off)
    assert device_check._show_steps("bf16", off)
    assert not device_check._show_steps("bf16", [(2, "grad_norm", 1.5, 1.4)])
    assert capsys.readouterr().out.count("DIFFERS") == 2


def test_it_begins_with_the_versions_that_results_depend_on(tmp_path, monkeypatch):
    (tmp_path / "8.5.0").mkdir()
    (tmp_path / "latest").symlink_to("8.5.0")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "latest"))
    said = device_check.software()
    assert said[0] == f"torch {version('torch')}"
    assert said[-1] == f"CANN in {tmp_path / '8.5.0'}"
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME")
    assert device_check.software() == said[:-1]
