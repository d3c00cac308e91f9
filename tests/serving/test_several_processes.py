"""One server before the engines of two processes."""

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import urllib.request

import gloo
import openai
import psutil
import pytest
from tiny_server import client, server_of, serving, write_theirs

from launch.port import free_port

PROMPTS = ["the cat sat on", "the dog", "a", "the log and the mat, and the cat sat on the dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from pangu.weights.convert import import_model

    gloo.single()
    theirs, ours = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("model") / "ours"
    write_theirs(theirs, experts=4)
    import_model(theirs, ours)
    return ours


def answers(address):
    """Of six requests at a time, one of them with two choices: greedy ones and sampled ones."""

    def ask(number):
        found = client(address).completions.create(
            model="tiny",
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=10 + 3 * number,
            temperature=number % 3 / 2,
            seed=number,
            n=1 + (number == 5),
        )
        return [choice.text for choice in found.choices]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return list(pool.map(ask, range(6)))


@pytest.fixture(scope="module")
def expected(folder):
    from pangu.trained_model import load_for_inference, read_run_config

    config = read_run_config(folder)
    loaded = (*load_for_inference(config, folder), config)
    with serving(server_of(folder, loaded, name="tiny")) as address:
        return answers(address)


def metric(address, name):
    lines = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@contextlib.contextmanager
def torchrun(folder, *options):
    """The launcher, and the address of the server of its two processes."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["--shutdown-timeout=60", "-m", "pangu.serve", f"checkpoint={folder}", "port=0"]
    command += ["name=tiny", "backend=cpu", "launch.timeout_minutes=1", *options]
    launcher = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    ranks = []
    try:
        said, _, address = launcher.stdout.readline().strip().rpartition(" ")
        assert said == "serving on"
        ranks = psutil.Process(launcher.pid).children()
        yield launcher, address
        assert not psutil.wait_procs(ranks, timeout=10)[1]
    finally:
        launcher.kill()
        launcher.communicate()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def a_stream(address, tokens):
    """The events of an answer that has begun."""
    events = client(address).completions.create(
        model="tiny", prompt="the cat", max_tokens=tokens, stream=True, temperature=0
    )
    next(iter(events))
    return events


@pytest.mark.end_to_end
def test_tensor_parallel_ranks_answer_as_one_process_and_end_what_is_under_way(folder, expected):
    with torchrun(folder, "parallel.tensor_model_parallel_size=2") as (launcher, address):
        assert answers(address) == expected
        assert metric(address, "pangu_generated_tokens_total") >= 120  # 105 were the most asked
        assert metric(address, "pangu_cache_used") == 0
        events = a_stream(address, 60)
        launcher.terminate()
        assert [event.choices[0].finish_reason for event in events][-1] in ("length", "stop")
        assert launcher.wait(60) == 1


@pytest.mark.end_to_end
def test_experts_on_both_ranks_answer_as_one_process_and_one_that_is_killed_ends_the_server(
    folder, expected
):
    # Guesses of a tree are not drawn: sampled texts stay what they are.
    words = ["speculative=draft", f"draft={folder}", "speculative.tree=true"]
    words += ["parallel.expert_model_parallel_size=2"]
    with torchrun(folder, *words) as (launcher, address):
        assert answers(address) == expected
        events = a_stream(address, 400)
        rank_of = {rank.environ()["RANK"]: rank for rank in psutil.Process(launcher.pid).children()}
        rank_of["1"].kill()
        with pytest.raises(openai.APIError, match="decoding has failed"):
            list(events)
        # torchrun tells rank 0 to stop: later ones are a 503, or nobody listens any more.
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as found:
            client(address).completions.create(model="tiny", prompt="a", max_tokens=4)
        assert getattr(found.value, "status_code", 503) == 503
        assert launcher.wait(60) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["parallel.tensor_model_parallel_size=2"], "WORLD_SIZE=1: tensor x pipeline x context"),
        (["parallel.expert_model_parallel_size=0"], "=0: must be more than 0"),
        (["launch.timeout_minutes=0"], "launch.timeout_minutes=0.0: must be more than 0"),
    ],
)
def test_layouts_that_do_not_fit_are_a_sentence(folder, words, sentence, capsys):
    from pangu.serve import main

    assert main([f"checkpoint={folder}", *words]) == 2
    assert sentence in capsys.readouterr().err
