"""How quickly the planner page answers: `python benchmarks/planner.py`.

Starts `python -m simulator serve` and asks over HTTP as the page does: searches of about 2,000 and
of 100,000 layouts, each several times, and every layout that they show. Prints milliseconds, and
the CPU time of the server for each request beside them, which other work does not touch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

PLAN = ["model=pangu_pro_moe", "hardware=ascend_910b_376t", "devices=64"]
PLAN += ["train.global_batch_size=128", "train.seq_length=4096"]
SMALL = ["parallel.context_parallel_size=1", "parallel.expert_model_parallel_size=8"]
SMALL += ["train.micro_batch_size=1"]
TIMES = 5


def main() -> None:
    """Run and print."""
    command = [sys.executable, "-m", "simulator", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        address = server.stdout.readline().split()[0]
        measure(server.pid, address, [*PLAN, *SMALL])
        measure(server.pid, address, PLAN)
    finally:
        server.terminate()
        server.wait()


def measure(pid: int, address: str, overrides: list[str]) -> None:
    """One plan: its search, and a click on each of the layouts found."""
    body = json.dumps({"overrides": overrides}).encode()
    searches = [timed(pid, Request(f"{address}search", data=body)) for _ in range(TIMES)]
    found = json.loads(searches[-1][2])
    shown = found["ranking"] + found["front"]
    clicks = [
        timed(pid, Request(f"{address}layout?" + urlencode([("o", o) for o in one["overrides"]])))
        for one in shown
    ]
    print(f"{found['evaluated']:,} layouts evaluated, {found['fitting']:,} fit")
    for name, requests in (("search", searches), ("click on a layout", clicks)):
        wall, busy = ([1e3 * request[i] for request in requests] for i in (0, 1))
        print(
            f"  {name}, {len(requests)} times: median {statistics.median(wall):.0f} ms, at most"
            f" {max(wall):.0f} ms; CPU {statistics.median(busy):.0f} and {max(busy):.0f} ms"
        )


def timed(pid: int, request: Request) -> tuple[float, float, bytes]:
    """Wall and CPU seconds of a request, and its answer."""
    before, start = cpu_seconds(pid), time.perf_counter()
    with urlopen(request) as answer:
        text = answer.read()
    return time.perf_counter() - start, cpu_seconds(pid) - before, text


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in steps of 10 ms (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
