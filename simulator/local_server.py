"""Pages over HTTP, on this machine alone: what the planner and a run's report have in common.

Anything that is not answered is a 4xx with a sentence. A page of another site cannot ask: its
requests carry another host's name or origin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, urlsplit

from configs.violation import ConfigError, Violation

HOST = "127.0.0.1"
LONGEST_BODY = 64 * 1024
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'"
)

Answer = tuple[str, str]  # media type and text


class Refused(Exception):
    """A request that is answered with `status` and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class LocalServer(ThreadingHTTPServer):
    """`get` answers addresses, `post` a path and its body; both may raise `Refused`."""

    daemon_threads = True

    def __init__(
        self,
        port: int,
        get: Callable[[SplitResult], Answer],
        post: Callable[[str, bytes], Answer] | None = None,
    ) -> None:
        super().__init__((HOST, port), _Handler)
        self.get, self.post = get, post

    @property
    def names(self) -> tuple[str, ...]:
        """What a browser calls this server."""
        return tuple(f"{name}:{self.server_address[1]}" for name in (HOST, "localhost"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(port: int, make: Callable[[int], LocalServer]) -> None:
    """Make a server for a port (0: any free), say where it is, and serve until Ctrl-C.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    try:
        server = make(port)
    except OSError as error:
        reason = f"cannot be listened on: {error.strerror}"
        raise ConfigError(
            [Violation("--port", port, reason, "--port 0 takes a free one")]
        ) from None
    print(f"http://{server.names[0]}/ (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds for a request to arrive
    server_version, sys_version = "pangu", ""

    def do_GET(self) -> None:
        self._answer(lambda: self.server.get(urlsplit(self.path)))

    def do_POST(self) -> None:
        self._answer(self._post)

    def _post(self) -> Answer:
        body = self._body()
        if self.server.post is None:
            raise Refused(405, "there is nothing to post to")
        return self.server.post(urlsplit(self.path).path, body)

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(411, "a body needs its length") from None
        if not 0 <= length <= LONGEST_BODY:
            raise Refused(413, f"a body has at most {LONGEST_BODY} bytes")
        return self.rfile.read(length)

    def _answer(self, work: Any) -> None:
        try:
            self._refuse_strangers()
            kind, text = work()
            self._send(200, kind, text)
        except Refused as refused:
            self.close_connection = True  # a body may be left unread
            self._send(refused.status, "application/json", _sentence(str(refused)))
        except ConfigError as error:
            self._send(422, "application/json", _sentence(str(error), error.violations))
        except (ValueError, OverflowError, MemoryError, ArithmeticError) as error:
            self.close_connection = True
            words = f"that cannot be planned: {' '.join(str(error).split())[:300]}"
            self._send(400, "application/json", _sentence(words))

    def _refuse_strangers(self) -> None:
        names = self.server.names
        if self.headers.get("Host") not in names:
            raise Refused(421, f"this server is {names[0]}")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in tuple(f"http://{name}" for name in names):
            raise Refused(403, "another site's page may not ask")

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses itself: methods, malformed and overlong requests."""
        status = 405 if code == 501 else code
        self.close_connection = True
        self.request_version = self.protocol_version  # an answer to nonsense has a head, too
        self._send(status, "application/json", _sentence(message or "the request is malformed"))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: the page shows what happens."""


def _sentence(words: str, violations: list[Violation] | None = None) -> str:
    keys = [one.key for one in violations or []]
    return json.dumps({"error": words, "keys": keys})
