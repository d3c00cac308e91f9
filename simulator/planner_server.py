"""The planner page over HTTP:

GET  /                       the page
POST /search {"overrides"}   ranking and Pareto front
GET  /layout?o=key=value&…   the page of one layout
"""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from urllib.parse import SplitResult, parse_qs

from simulator.local_server import Answer, LocalServer, Refused
from simulator.page import fill
from simulator.planner import Planner, checked, options

TEMPLATE = Path(__file__).with_name("planner.html")


class PlannerServer(LocalServer):
    """One planner for all requests, which takes one at a time: composing a configuration is not
    for threads."""

    def __init__(self, port: int) -> None:
        super().__init__(port, self._get, self._post)
        self.planner = Planner()
        self.lock = Lock()
        self.page = fill(TEMPLATE, options())

    def _get(self, address: SplitResult) -> Answer:
        if address.path == "/":
            return "text/html", self.page
        if address.path != "/layout":
            raise Refused(404, "there is /, /search and /layout")
        overrides = checked(parse_qs(address.query, max_num_fields=100).get("o", []))
        with self.lock:
            return "text/html", self.planner.page(overrides)

    def _post(self, path: str, body: bytes) -> Answer:
        if path != "/search":
            raise Refused(404, "there is /search to post to")
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(asked, dict) or set(asked) != {"overrides"}:
            raise Refused(400, 'the body is not {"overrides": [key=value, …]}')
        overrides = checked(asked["overrides"])
        with self.lock:
            found = self.planner.search(overrides)
        return "application/json", json.dumps(found, allow_nan=False)
