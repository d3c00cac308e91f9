"""Nothing lost in silence: damage, tensors that do not match, spoilt weights."""

import pytest
from checkpoint_damage import MOMENT, everything
from gloo import run


@pytest.mark.distributed
def test_what_cannot_be_used_is_named_and_the_run_goes_on_from_what_can(tmp_path, capfd):
    found, other_rank = run(2, everything, tmp_path)

    damaged = found["damaged"]
    for name in ("truncated", "missing", "manifest"):
        # from step 2: the damaged one is set aside, the rows of steps 3 to 5 are new
        assert damaged[name] == (["step_00000004"], 5), name
    assert "every checkpoint of" in damaged["all"]
    assert "step_00000002 (__1_0.distcp has 1000 of" in damaged["all"]
    assert other_rank["damaged"]["all"] == damaged["all"], "all ranks leave together"

    said = found["refusals"]
    assert "model.hidden_size=64: the checkpoint" in said["shape"]
    assert "has 32 (model.hidden_size=32; or another run_dir)" in said["shape"]
    assert "moe.router_scale=False: the checkpoint" in said["shape"]
    assert "moe.score_function=sigmoid: the checkpoint" in said["function"]
    assert "allow_changes=[model.norm_epsilon,moe.score_function])" in said["function"]
    assert said["allowed"] == "[5]", "it went on from step 4"
    changed = "changed since that checkpoint: model.norm_epsilon=0.001 (was "
    assert changed in capfd.readouterr().err
    assert f"does not fit this model: {MOMENT} is missing" in said["lost"]
    assert "decoder.layers.9.mlp.experts.w1 is extra" in said["added"]
    assert "refused_function" not in said["shelf"]
    assert "refused_shape" not in said["shelf"], "refused before anything was written"

    steps, sentence = found["other run"]
    assert steps == [5], "from the newest of the run that was named"
    assert "is no sound checkpoint: no checkpoint is complete" in sentence

    steps, sequences, skipped, rollbacks = found["poisoned"]
    assert (steps, skipped, rollbacks) == (8, 2, 1)
    # Seven steps (two of them skipped) read their data once; four more went from step 4 to 8.
    assert sequences == (7 + 4) * 8

    assert found["weights"] == 0.0

    for gathered, kept, written in (found["held"], other_rank["held"]):
        assert 0.4 * gathered < written < 0.6 * gathered, "two replicas share the writing"
        assert kept <= written
