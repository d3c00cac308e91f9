"""How a sweep is laid out: names, folders, arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.violation import ConfigError
from pangu import machine_check
from pangu.sweep import plan


def test_every_combination_in_a_folder_of_its_own(tmp_path: Path) -> None:
    jobs = plan(["moe=moge,top_k", "optimizer.lr=1e-3,5e-4", f"run_dir={tmp_path}", "seed=7"])
    assert [job.name for job in jobs] == [
        "moe=moge,optimizer.lr=1e-3",
        "moe=moge,optimizer.lr=5e-4",
        "moe=top_k,optimizer.lr=1e-3",
        "moe=top_k,optimizer.lr=5e-4",
    ]
    last = jobs[-1]
    assert (last.config.moe.router, last.config.optimizer.lr, last.config.seed) == (
        "top_k",
        5e-4,
        7,
    )
    assert last.run_dir == tmp_path / "moe=top_k,optimizer.lr=5e-4"


def test_ranges_choices_and_globs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "memory_bytes", lambda: 2**60)
    jobs = plan(["seed=range(1,4)", "model=glob(pangu_ultra_m*)", "train.steps=choice(5,6)"])
    assert [(job.config.seed, job.config.train.steps) for job in jobs] == [
        (seed, steps) for seed in (1, 2, 3) for steps in (5, 6)
    ]
    assert {job.config.model.name for job in jobs} == {"pangu_ultra_moe"}


def test_names_are_folder_names() -> None:
    jobs = plan(["data.tokenizer=a/b,'c d'"])
    assert [job.run_dir.name for job in jobs] == ["data.tokenizer=a_b", "data.tokenizer=_c_d_"]
    assert [job.config.data.tokenizer for job in jobs] == ["a/b", "c d"]


def test_every_mistake_of_every_job_before_the_first_starts() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(["moe.top_k=3,4,6", "moe=moge"])
    assert [v.reason.split(":")[0] for v in caught.value.violations] == [
        "in job moe.top_k=3",
        "in job moe.top_k=6",
    ]
    with pytest.raises(ConfigError) as caught:
        plan(["moe.top_k=3,4", "seed=1,2", "optimizer.lr=a"])
    reasons = {v.key: v.reason.split(":")[0] for v in caught.value.violations}
    assert reasons == {
        "optimizer.lr": "in every job",
        "moe.num_expert_groups": "in job moe.top_k=3,seed=1 and 1 more",
    }
    for overrides, reason in (
        (["seed=1"], "without a list"),
        (["seed=interval(1,2)"], "interval"),
        (["run_dir=a,b"], "names the folders"),
        (["model=glob(nothing*)"], "matches no option"),
        (["seed=1,2", "moe=nonesuch"], "no file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            plan(overrides)


def test_data_that_are_not_there_are_named_with_their_jobs() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(["data=synthetic,indexed", "data.blend={absent: 1}"])
    assert [v.reason for v in caught.value.violations] == [
        f"in job data=indexed: there is no file absent.{end}" for end in ("bin", "idx")
    ]
