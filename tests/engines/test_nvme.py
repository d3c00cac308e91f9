"""What `engine.offload=nvme` has in files, beside the bytes of the files."""

import errno
import gc
import os

import gloo
import pytest
import torch
from deepspeed_runs import COMMON
from trained_model import build, micro_batch

from configs.violation import ConfigError
from pangu import backends
from pangu.engines.deepspeed.files import Handle

backends.select("cpu")


@pytest.mark.parametrize("size", [1, 511, 2**18, 2**20 + 123])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_from_files_as_they_went(size, dtype, tmp_path):
    handle = Handle(block_size=2**18)
    sent = [
        torch.randn(size).to(dtype),
        handle.new_cpu_locked_tensor(size, torch.ones((), dtype=dtype)),
    ]
    sent[1].copy_(sent[0] * 2)
    for number, tensor in enumerate(sent):
        assert handle.async_pwrite(tensor, str(tmp_path / f"{number}")) == 0
    assert handle.wait() == 2
    assert handle.wait() == 0
    for number, tensor in enumerate(sent):
        written = (tmp_path / f"{number}").read_bytes()
        assert written == tensor.view(torch.uint8).numpy().tobytes()
        came = handle.new_cpu_locked_tensor(size, tensor).zero_()
        handle.async_pread(came, str(tmp_path / f"{number}"))
        assert handle.wait() == 1
        assert torch.equal(came, tensor)


def test_what_does_not_arrive_is_an_error_that_names_the_file(tmp_path):
    handle = Handle()
    short = tmp_path / "short"
    short.write_bytes(b"1234")
    for path, number in (
        ("/dev/full", errno.ENOSPC),
        (str(tmp_path / "no" / "folder"), errno.ENOENT),
    ):
        handle.async_pwrite(torch.ones(300), path)
        with pytest.raises(OSError, match=path) as caught:
            handle.wait()
        assert caught.value.errno == number
    handle.async_pread(torch.ones(2), str(short))
    with pytest.raises(OSError, match="the file ends too early"):
        handle.wait()
    assert handle.wait() == 0


def test_only_what_a_handle_gave_and_its_parts_are_pinned():
    room = Handle().new_cpu_locked_tensor(10, torch.ones(1))
    assert room.data_ptr() % 4096 == 0, "direct transfers want a page's beginning"
    assert Handle().is_pinned(room)
    assert Handle().is_pinned(room[4:].view(2, 3))
    assert not Handle().is_pinned(torch.ones(10))


def on_the_drive(folder):
    """Weights that are not in the file after two steps, as whole bytes, and the folder's files."""
    drive = ["engine=deepspeed", "parallel.zero_stage=3", "engine.offload=nvme"]
    drive += [f"engine.nvme_path={folder}", "model.vocab_size=16384"]
    drive += [
        "model.lora_rank=4",
        "model.lora_modules=[linear_qkv]",
    ]  # others are trained by nobody
    model = build([*COMMON, *drive])
    for number in range(2):
        model.step([micro_batch(number)])
    file = model.engine.weights_file._file._file.fileno()
    held = os.pread(file, os.fstat(file).st_size, 0)
    with model.engine.whole_weights():
        weights = dict(model.chunks[0].named_parameters())
        absent = [n for n, w in weights.items() if w.detach().numpy().tobytes() not in held]
    return (
        absent,
        len(weights),
        model.engine.weights_file.bytes,
        sum(w.nbytes for w in weights.values()),
    )


def full(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError) as caught:
        on_the_drive(folder)
    return str(caught.value)


def test_weights_are_in_the_file_trained_and_not(tmp_path):
    absent, count, written, size = gloo.alone(on_the_drive, tmp_path / "drive")
    assert absent == []
    assert count > 20
    assert written >= size
    gc.collect()
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_full_drive_is_a_sentence(tmp_path, monkeypatch):
    said = gloo.alone(full, tmp_path / "drive", monkeypatch)
    assert "cannot be written: No space left on device" in said
    assert said.startswith("engine.nvme_path=")
