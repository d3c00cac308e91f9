"""One server before the engines of two processes."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import gloo
import openai
import pytest
import torch.distributed as dist
from tiny_server import client, server_of, serving, write_theirs

from launch.environment import ProcessEnvironment
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


def until_it_serves(address):
    for _ in range(600):
        try:
            return urllib.request.urlopen(f"{address}/health")
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(address)


def metric(address, name):
    lines = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def a_client(address, pids, found):
    """Asks, then tells all ranks to stop in the middle of an answer."""
    until_it_serves(address)
    found["answers"] = answers(address)
    found["tokens"] = metric(address, "pangu_generated_tokens_total")
    found["used"] = metric(address, "pangu_cache_used")
    events = client(address).completions.create(
        model="tiny", prompt="the cat", max_tokens=60, stream=True, temperature=0
    )
    next(iter(events))
    for pid in pids[::-1]:  # as a launcher does
        os.kill(pid, signal.SIGTERM)
    found["finish"] = [event.choices[0].finish_reason for event in events][-1]


def served(folder, port, options):
    from pangu.serve import Options, serve

    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    rank, found = dist.get_rank(), {}
    arguments = (f"http://127.0.0.1:{port}", pids, found)
    asking = threading.Thread(target=a_client, args=arguments)
    if rank == 0:
        asking.start()
    process = ProcessEnvironment("torchrun", rank, 2, rank, 2)
    asked = Options(checkpoint=str(folder), port=port, name="tiny", backend="cpu", **options)
    found["ended well"] = serve(asked, process)
    if rank == 0:
        asking.join()
    return found


# Guesses of a tree are not drawn: sampled texts stay what they are.
EXPERTS = {"parallel_expert_model_parallel_size": 2, "speculative": "draft"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [EXPERTS | {"speculative_tree": True}, {"parallel_tensor_model_parallel_size": 2}],
    ids=["experts on both", "tensor parallel"],
)
def test_two_processes_answer_as_one_does_and_end_what_is_under_way(folder, expected, options):
    if "speculative" in options:
        options = options | {"draft": str(folder)}
    one, other = gloo.run(2, served, folder, free_port(), options)
    assert one["answers"] == expected
    assert one["tokens"] >= sum(10 + 3 * number for number in range(6)) - 30
    assert one["used"] == 0
    assert one["finish"] in ("length", "stop")
    assert one["ended well"]
    assert other == {"ended well": True}


@pytest.mark.end_to_end
def test_a_worker_that_is_killed_is_a_503_and_no_hang(folder, tmp_path):
    port, rendezvous = free_port(), free_port()
    words = [f"checkpoint={folder}", f"port={port}", "name=tiny", "backend=cpu"]
    words += ["parallel.expert_model_parallel_size=2", "launch.timeout_minutes=1"]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(rendezvous), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pangu.serve", *words],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=(tmp_path / rank).open("wb"),
        )
        for rank in "01"
    ]
    address = f"http://127.0.0.1:{port}"
    try:
        until_it_serves(address)
        options = {"model": "tiny", "prompt": "the cat", "max_tokens": 400}
        events = iter(client(address).completions.create(**options, stream=True, seed=1))
        next(events)
        ranks[1].kill()
        with pytest.raises(openai.APIError, match="decoding has failed"):
            list(events)
        with pytest.raises(openai.InternalServerError) as found:
            client(address).completions.create(**options)
        assert found.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/health")
        ranks[0].terminate()
        assert ranks[0].wait(60) == 1
    finally:
        for process in ranks:
            process.kill()


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
