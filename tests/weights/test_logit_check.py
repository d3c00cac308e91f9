"""What was converted is read again and compared with transformers, unless that is switched off."""

from compression.tiny import compress, llama
from gloo import leave
from weights.test_round_trip import pangu_pro, save_theirs

from pangu import logit_check
from pangu.convert import main
from pangu.weights import convert


def converted(*words):
    leave()
    return main([str(word) for word in words])


def test_a_conversion_is_compared_and_what_differs_is_gone(tmp_path, capsys, monkeypatch):
    save_theirs("deepseek_v3", tmp_path / "theirs")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert converted("import", tmp_path / "theirs", "--out", ours) == 0
    assert converted("export", ours, "--dtype", "bfloat16", "--out", back) == 0
    assert capsys.readouterr().out.count("logits on 48 tokens within") == 2
    read = convert._read
    monkeypatch.setattr(
        convert, "_read", lambda source, name: read(source, name) * (1 + ("o_proj" in name))
    )
    assert converted("import", back, "--out", tmp_path / "wrong") == 2
    assert "are not the same model: on 48 tokens" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    assert converted("import", back, "--out", tmp_path / "wrong", "--no-check") == 0
    assert "transformers" not in capsys.readouterr().out


def test_why_nothing_was_compared(tmp_path, capsys, monkeypatch):
    pangu_pro(tmp_path / "pro")
    assert converted("import", tmp_path / "pro", "--out", tmp_path / "ours of pro") == 0
    assert "it has no PanguProMoEForCausalLM" in capsys.readouterr().out
    llama(tmp_path, num_hidden_layers=2)
    words = ["--calibration", tmp_path / "text", "--tokens", "64", "--window", "32"]
    words += ["--scheme", "W8A8", "--out", tmp_path / "small"]
    assert compress(["quantize", tmp_path / "ours", *words]) == 0
    assert converted("export", tmp_path / "small", "--out", tmp_path / "out") == 0
    assert "not compared with transformers: it rounds activations" in capsys.readouterr().out
    monkeypatch.setattr(logit_check, "_free_bytes", lambda: 0)
    assert converted("export", tmp_path / "ours", "--out", tmp_path / "back") == 0
    assert "in float32, and 0.0 GiB are free" in capsys.readouterr().out
