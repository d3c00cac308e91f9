"""A load test with OpenAI's own client: 200 mixed requests, 32 at a time, a third cancelled on the
way, then 1,000 malformed ones. Nothing may be lost or left behind.

    python -m tests.drills.serving_load [--requests 200] [--malformed 1000] [--model DIR]

Without a model, a tiny Llama with random weights answers. The times printed are of this machine as
it is; a test asserts none of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

AT_A_TIME = 32
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran")


@dataclass
class Outcome:
    """Of a request: seconds to its first piece of text, and from piece to piece after it."""

    finish: str
    text: str = ""
    first: float = 0.0
    each: float = 0.0


def mixed(api, number: int) -> Outcome:
    """A chat or a completion, streamed or whole, greedy or not, long or short; every third is
    left in the middle of its stream."""
    dice = random.Random(number)
    prompt = " ".join(dice.choices(WORDS, k=number % 60 + 1))
    options = {"model": "load", "max_tokens": dice.randint(1, 60), "seed": number}
    options |= {"temperature": dice.choice([0, 0.7, 1.2]), "stop": dice.choice([None, "zq"])}
    leave = number % 3 == 0
    stream = leave or dice.random() < 0.5
    chat = dice.random() < 0.5
    start = time.perf_counter()
    if chat:
        turns = [{"role": "user", "content": prompt}]
        answer = api.chat.completions.create(messages=turns, stream=stream, **options)
    else:
        answer = api.completions.create(prompt=prompt, stream=stream, **options)
    if not stream:
        choice = answer.choices[0]
        return Outcome(choice.finish_reason, choice.message.content if chat else choice.text)
    found, came = Outcome("cancelled"), []
    for event in answer:
        choice = event.choices[0]
        piece = (choice.delta.content if chat else choice.text) or ""
        if piece:
            came.append(time.perf_counter())
        found.text += piece
        if leave and came:
            answer.close()
            break
        found.finish = choice.finish_reason or found.finish
    if came:
        found.first = came[0] - start
        found.each = (came[-1] - came[0]) / max(1, len(came) - 1)
    return found


def malformed(address: str, number: int) -> int:
    """The status of a request that is broken somewhere."""
    dice = random.Random(number)
    body = json.dumps({"model": "load", "prompt": "x", "max_tokens": 1}).encode()
    kinds = [
        lambda: body[: dice.randrange(len(body))],
        lambda: dice.randbytes(dice.randrange(1, 300)),
        lambda: body.replace(b"1", dice.choice([b"0", b"-3", b"1.5", b'"1"', b"null", b"1e99"])),
        lambda: body.replace(b'"x"', dice.choice([b"[]", b"{}", b"7", b'["a"]', b'"\\ud800"'])),
        lambda: body.replace(b"max_tokens", b"max_toke"),
        lambda: b"[" * dice.randrange(1, 5000),
    ]
    request = urllib.request.Request(
        f"{address}/v1/completions", dice.choice(kinds)(), {"Content-Type": "application/json"}
    )
    try:
        return urllib.request.urlopen(request, timeout=120).status
    except urllib.error.HTTPError as error:
        json.load(error)["error"]["message"]
        return error.code


def drill(server, address: str, requests: int, broken: int) -> dict[str, float]:
    """What came out, in figures.

    Raises:
        AssertionError: a request was lost, something was left behind, or a malformed request was
            not refused.
    """
    from tiny_server import client

    api = client(address)
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = list(pool.map(lambda number: mixed(api, number), range(requests)))
    ends = [outcome.finish for outcome in outcomes]
    assert all(end == "cancelled" for end in ends[::3] if end not in ("stop", "length"))
    rest = [end for number, end in enumerate(ends) if number % 3]
    assert set(rest) <= {"stop", "length"}, "a request was lost"
    end = time.monotonic() + 120
    while server.worker.open or server.worker.engine.busy:
        assert time.monotonic() < end, "requests are left behind"
        time.sleep(0.05)
    assert server.worker.engine.scheduler.pool.used == 0, "pages are left behind"
    again = [mixed(api, number) for number in range(1, requests, max(1, requests // 10))]
    for number, outcome in zip(range(1, requests, max(1, requests // 10)), again, strict=True):
        if number % 3:
            assert outcome.text == outcomes[number].text, "a text depended on its neighbours"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda number: malformed(address, number), range(broken)))
    assert all(400 <= status < 500 for status in statuses), sorted(set(statuses))
    assert urllib.request.urlopen(f"{address}/health").status == 200
    firsts = sorted(outcome.first for outcome in outcomes if outcome.first)
    eaches = sorted(outcome.each for outcome in outcomes if outcome.each)
    figures = {"requests": len(ends), "cancelled": ends.count("cancelled"), "refused": broken}
    for name, values in (("first_token", firsts), ("per_token", eaches)):
        figures[f"{name}_p50"] = values[len(values) // 2]
        figures[f"{name}_p99"] = values[int(len(values) * 0.99)]
    return figures


def main() -> None:
    import gloo
    from tiny_server import server_of, serving, write_theirs

    from pangu.trained_model import load_for_inference, read_run_config
    from pangu.weights.convert import import_model

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--malformed", type=int, default=1000)
    options.add_argument("--model", type=Path)
    given = options.parse_args()
    gloo.single()
    with tempfile.TemporaryDirectory() as name:
        folder = given.model
        if folder is None:
            theirs, folder = Path(name) / "theirs", Path(name) / "ours"
            theirs.mkdir()
            write_theirs(theirs)
            import_model(theirs, folder)
        config = read_run_config(folder)
        loaded = (*load_for_inference(config, folder), config)
        server = server_of(folder, loaded, name="load", max_queue=200)
        with serving(server) as address:
            figures = drill(server, address, given.requests, given.malformed)
    for key, value in figures.items():
        print(f"{key:16} {value:.3f}" if isinstance(value, float) else f"{key:16} {value}")


if __name__ == "__main__":
    main()
