"""The planner page: its forecasts are the command line's, and nothing that is sent to it hurts."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import drawn, needs_browser
from typer.testing import CliRunner

from simulator.__main__ import application
from simulator.local_server import LONGEST_BODY
from simulator.planner_server import PlannerServer

PLAN = ["model=pangu_pro_moe", "hardware=ascend_910b_376t", "devices=16"]
PLAN += ["train.global_batch_size=64", "train.seq_length=4096", "parallel.context_parallel_size=1"]
PLAN += ["model.num_layers=8"]


@contextmanager
def serving():  # type: ignore[no-untyped-def]
    server = PlannerServer(0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with serving() as one:
        yield one


def ask(
    server: PlannerServer, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Status and text of a request; a body is posted, as JSON unless it is bytes."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def layout(overrides: list[str]) -> str:
    return "/layout?" + urlencode([("o", line) for line in overrides])


@pytest.fixture(scope="module")
def found(server: PlannerServer) -> dict[str, Any]:
    status, text = ask(server, "/search", {"overrides": PLAN})
    assert status == 200, text
    return json.loads(text)


def command_line(name: str, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(application([name]), [name, *arguments, "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_a_search_is_the_command_line_s(found: dict[str, Any]) -> None:
    said = command_line("search", *PLAN)
    assert len(found["ranking"]) == 10
    assert [c["step"] for c in found["ranking"]] == [c["step_seconds"] for c in said["ranking"]]
    assert [c["peak"] for c in found["front"]] == [c["peak_memory_gib"] for c in said["pareto"]]
    assert dict(found["rejected"]) == said["rejected"]
    assert found["title"] == "pangu_pro_moe on 16 × ascend_910b_376t"


def test_a_layout_s_forecast_is_the_command_line_s(
    server: PlannerServer, found: dict[str, Any], tmp_path: Any
) -> None:
    """By the copied command, and by the copied experiment; uneven stages among them."""
    chosen = [found["ranking"][0], found["front"][-1]]
    chosen += [c for c in found["ranking"] if "pipeline_layout" in c["command"]][:1]
    for one in chosen:
        python, flag, name, *arguments = shlex.split(one["command"])
        assert (python, flag, name) == ("python", "-m", "simulator")
        said = command_line(*arguments)
        assert said["step_seconds"] == one["step"]
        assert said["peak_memory_gib"] == one["peak"]
        assert said["breakdown"] == one["breakdown"]
        status, page = ask(server, layout(one["overrides"]))
        assert status == 200
        data = json.loads(page.split("const data = ")[1].split(";\n")[0])
        assert data["step"] == said["step_seconds"]
        file = tmp_path / "plan.yaml"
        file.write_text(one["experiment"])
        again = command_line("predict", f"experiment={file}")
        assert again["step_seconds"] == one["step"]
    assert len(chosen) == 3


def test_a_forgotten_layout_is_forecast_again(found: dict[str, Any]) -> None:
    one = found["ranking"][1]
    with serving() as other:
        status, page = ask(other, layout(one["overrides"]))
    assert status == 200
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    assert data["step"] == pytest.approx(one["step"])


def test_what_cannot_be_is_a_sentence_under_its_key(server: PlannerServer) -> None:
    status, text = ask(server, "/search", {"overrides": [*PLAN, "train.seq_length=-4"]})
    assert status == 422
    assert json.loads(text)["keys"] == ["train.seq_length"]
    assert json.loads(text)["error"].startswith("train.seq_length=-4: must be at least 1")
    status, text = ask(server, "/search", {"overrides": [*PLAN, "hardware.memory_gib=1"]})
    assert status == 200
    assert json.loads(text)["reason"].startswith("none of ")
    assert json.loads(text)["ranking"] == []


HOSTILE: list[tuple[int, str, Any]] = [
    (404, "/nothing", None),
    (404, "/../../etc/passwd", None),
    (404, "/%2e%2e/%2e%2e/etc/passwd", None),
    (404, "/nothing", {}),
    (400, "/search", b"{"),
    (400, "/search", b"\xff\xfe\x00"),
    (400, "/search", b"[" * 50_000),
    (400, "/search", []),
    (400, "/search", {"overrides": PLAN, "more": 1}),
    (422, "/search", {"overrides": "devices=4"}),
    (422, "/search", {"overrides": [1]}),
    (422, "/search", {"overrides": ["devices=4"] * 65}),
    (422, "/search", {"overrides": ["devices"]}),
    (422, "/search", {"overrides": ["devices=" + "9" * 1900]}),
    (422, "/search", {"overrides": [*PLAN, "devices=1e308"]}),
    (422, "/search", {"overrides": [*PLAN, "devices=9999999999999999999999"]}),
    (422, "/search", {"overrides": [*PLAN, "train.global_batch_size=nan"]}),
    (422, "/search", {"overrides": [*PLAN, "model.num_layers=99999999"]}),
    (422, "/search", {"overrides": [*PLAN, "hardware.memory_gib=-inf"]}),
    (422, "/search", {"overrides": [*PLAN, "model=../../etc/passwd"]}),
    (422, "/search", {"overrides": [*PLAN, "hardware=/etc/passwd.yaml"]}),
    (422, "/search", {"overrides": [*PLAN, "experiment=/etc/passwd.yaml"]}),
    (422, "/search", {"overrides": [*PLAN, "hydra.run.dir=x"]}),
    (422, "/search", {"overrides": [*PLAN, "run_dir=x"]}),
    (422, "/search", {"overrides": [*PLAN, "model.name=${oc.env:HOME}"]}),
    (422, "/search", {"overrides": [*PLAN, "model.name=<script>"]}),
    (422, "/search", {"overrides": [*PLAN, "+model.colour=red"]}),
    (422, "/search", {"overrides": [*PLAN, "~model"]}),
    (422, "/search", {"overrides": [*PLAN, "parallel.pipeline_layout=[1,2]"]}),
    (422, "/layout?o=model", None),
    (422, "/layout", None),
    (422, layout([*PLAN, "parallel.tensor_model_parallel_size=3"]), None),
    (400, "/layout?" + "&".join(["o=devices%3D4"] * 200), None),
]


@pytest.mark.parametrize(("status", "path", "body"), HOSTILE)
def test_hostile_requests_are_refused_with_a_sentence(
    server: PlannerServer, status: int, path: str, body: Any
) -> None:
    got, text = ask(server, path, body)
    assert got == status, text
    error = json.loads(text)["error"]
    assert error
    assert len(error) < 3000
    assert "Traceback" not in text
    assert "/root" not in text


def raw(server: PlannerServer, request: bytes) -> bytes:
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_malformed_http_and_other_sites_are_refused(server: PlannerServer) -> None:
    host = f"Host: {server.names[0]}\r\n".encode()
    for request, status in (
        (b"nonsense\r\n\r\n", b"400"),
        (b"DELETE / HTTP/1.1\r\n" + host + b"\r\n", b"405"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + host + b"\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + host + b"A: b\r\n" * 200 + b"\r\n", b"431"),
        (b"POST /search HTTP/1.1\r\n" + host + b"\r\n{}", b"411"),
        (b"POST /search HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n", b"413"),
        (b"POST /search HTTP/1.1\r\n" + host + b"Content-Length: 9\r\n\r\n{}", b"400"),
    ):
        head, _, body = raw(server, request).partition(b"\r\n\r\n")
        assert status in head.split(b"\r\n")[0], (request[:40], head)
        assert json.loads(body)["error"]
    assert ask(server, "/search", b" " * (LONGEST_BODY + 1))[0] == 413
    assert ask(server, "/", headers={"Host": "planner.example"})[0] == 421
    assert ask(server, "/", headers={"Origin": "http://planner.example"})[0] == 403
    port = server.server_address[1]
    assert ask(server, "/", headers={"Origin": f"http://localhost:{port}"})[0] == 200
    assert server.server_address[0] == "127.0.0.1"
    with socket.create_connection(server.server_address):  # one that says nothing
        assert ask(server, "/")[0] == 200


def test_too_much_to_search_is_refused_before_it_starts(server: PlannerServer) -> None:
    large = ["model=pangu_ultra_moe", "hardware=ascend_910b_280t", "devices=65536"]
    large += ["train.global_batch_size=65536", "train.seq_length=4096"]
    status, text = ask(server, "/search", {"overrides": large})
    assert status == 422
    assert "evaluations (pin some sizes" in json.loads(text)["error"]


def test_the_page_needs_nothing_from_elsewhere(server: PlannerServer) -> None:
    status, page = ask(server, "/")
    assert status == 200
    assert not re.search(r'src="|@import|url\(|https?://(?!www\.w3\.org)', page)
    assert "__DATA__" not in page
    for key in re.findall(r'name="([\w.]+\.[\w.]+)"', page):  # every field is a key that is taken
        status, text = ask(server, layout(["model=moge_tiny", f"{key}=0"]))
        assert status == 422
        assert "is no key" not in text


DRIVER = """
<script>
const pause = () => new Promise((done) => setTimeout(done, 20));
const until = async (what) => { while (!what()) await pause(); };
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const press = (element, key) =>
  element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
(async () => {
  const said = [];
  await until(() => found);
  const buttons = all("#ranking button");
  buttons[0].focus();
  press(document.activeElement, "ArrowDown");
  said.push(document.activeElement === buttons[1]);
  document.activeElement.click();
  const frame = byId("layout"), page = () => frame.contentDocument;
  const step = () => page()?.querySelector("#tiles b")?.textContent;
  await until(() => frame.dataset.ms);
  said.push(step());
  said.push(byId("command").value === found.ranking[1].command);
  said.push(all("#timeline path.passes", page()).length > 0);
  press(document.querySelector("#dots circle.front"), "Enter");
  await until(() => step() === time(found.front[0].step, 3) && page().readyState === "complete");
  said.push(byId("command").value === found.front[0].command);
  const boxes = all("#ranking input");
  for (const box of boxes.slice(0, 3)) box.click();
  said.push(boxes.filter((box) => box.checked).length);
  said.push(all("#beside tbody tr").length > 8);
  said.push(document.documentElement.scrollWidth <= innerWidth);
  said.push(getComputedStyle(document.body).backgroundColor);
  fields.devices.value = "many";
  form.onchange();
  await until(() => byId("status").classList.contains("wrong"));
  said.push(byId("found").hidden + " " + byId("status").textContent.slice(0, 12));
  add(document.body, "pre", JSON.stringify(said), { id: "said" });
})();
</script>
"""


@pytest.mark.end_to_end
@needs_browser
@pytest.mark.parametrize(
    ("flags", "background"),
    [
        (["--window-size=1300,900"], "rgb(246, 247, 249)"),
        (["--window-size=390,844", "--blink-settings=preferredColorScheme=0"], "rgb(19, 22, 27)"),
    ],
    ids=["light", "dark phone"],
)
def test_a_browser_plans(flags: list[str], background: str, found: Any, tmp_path: Any) -> None:
    with serving() as own:
        own.page = own.page.replace("</body>", DRIVER + "</body>")
        address = f"http://{own.names[0]}/#" + "&".join(PLAN)
        dom = drawn(address, tmp_path / "profile", "--virtual-time-budget=20000", *flags)
    said = json.loads(dom.split('<pre id="said">')[1].split("</pre>")[0])
    step = f"{found['ranking'][1]['step']:.3g} s"
    assert said == [True, step, True, True, True, 2, True, True, background, "true devices=many"]


def test_a_port_in_use_is_one_sentence(server: PlannerServer) -> None:
    port = server.server_address[1]
    command = [sys.executable, "-m", "simulator", "serve", "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"--port={port}: cannot be listened on: Address already in use (--port 0 takes a free one)"
    )
