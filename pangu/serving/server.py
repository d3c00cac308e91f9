"""The HTTP side: OpenAI's API, health, metrics and a page to chat."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pangu.data.tokenizer import Tokenizer
from pangu.inference.batching import Request as Wanted
from pangu.inference.engine import Update
from pangu.inference.sampling import Sampling
from pangu.serving.answers import Answer, Choice
from pangu.serving.chat import ChatFormat, TemplateError
from pangu.serving.metrics import Metrics, Times
from pangu.serving.protocol import Body, ChatBody, CompletionBody
from pangu.serving.worker import Busy, Worker, WorkerDead


@dataclass(frozen=True)
class Limits:
    """`length`: tokens of a prompt and its answer together; `body`: bytes of a request."""

    length: int
    body: int


class Refused(Exception):
    """An answer that is an error, as OpenAI words it."""

    def __init__(self, status: int, message: str, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class Server:
    """What the routes share."""

    def __init__(
        self,
        *,
        worker: Worker,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits,
        chat: ChatFormat | None = None,
        api_key: str = "",
    ) -> None:
        self.worker, self.tokenizer, self.name = worker, tokenizer, name
        self.limits, self.chat, self.api_key = limits, chat, api_key
        experts = worker.experts
        self.metrics = Metrics(worker.engine, (lambda: experts.bytes_read) if experts else None)

    def prompt(self, body: CompletionBody | ChatBody) -> list[int]:
        """Tokens to go on from.

        Raises:
            Refused: the model is another, has no chat template, or no such tokens.
        """
        if body.model != self.name:
            raise Refused(
                404, f"there is no model {body.model!r}, only {self.name!r}", "model_not_found"
            )
        if isinstance(body, CompletionBody):
            if isinstance(body.prompt, str):
                return self.tokenizer.encode(body.prompt) or [self.tokenizer.eod]
            if max(body.prompt) >= self.tokenizer.vocab_size:
                most = self.tokenizer.vocab_size - 1
                raise Refused(400, f"the largest token is {most}", param="prompt")
            return body.prompt
        if self.chat is None:
            reason = "this model has no chat template: ask for a completion, or serve it with one"
            raise Refused(400, reason, param="messages")
        try:
            return self.chat.encode([message.as_dict() for message in body.messages])
        except TemplateError as error:
            raise Refused(400, str(error), param="messages") from None

    def wanted(self, body: CompletionBody | ChatBody, prompt: list[int]) -> list[Wanted]:
        """A request to the engine for each choice.

        Raises:
            Refused: the text would be too long.
        """
        room = self.limits.length - len(prompt)
        asked = body.max_tokens
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens or asked or max(1, room)
        assert asked is not None
        if asked > room:
            reason = (
                f"the prompt's {len(prompt)} tokens and {asked} more are above the "
                f"{self.limits.length} that this server takes"
            )
            raise Refused(400, reason, "context_length_exceeded", "max_tokens")
        seed = secrets.randbits(61) if body.seed is None else body.seed
        stop = self.chat.stop_tokens if self.chat and isinstance(body, ChatBody) else frozenset()
        return [
            Wanted(
                prompt=tuple(prompt),
                max_new_tokens=asked,
                sampling=Sampling(
                    repetition_penalty=body.repetition_penalty,
                    temperature=body.temperature,
                    top_k=body.top_k,
                    top_p=body.top_p,
                    min_p=body.min_p,
                    seed=seed + number,
                ),
                stop_tokens=stop | {self.tokenizer.eod},
                stop=body.stop_texts,
                logprobs=body.top_logprobs_count,
            )
            for number in range(body.n)
        ]

    async def answer(self, body: CompletionBody | ChatBody, request: Request) -> Response:
        """Of either kind of completion, streamed or whole.

        Raises:
            Refused
        """
        prompt = self.prompt(body)
        wanted = self.wanted(body, prompt)
        frame = Answer(self.name, isinstance(body, ChatBody), self.tokenizer, len(prompt))
        updates = self._watched(wanted)
        first = await anext(updates)  # what is refused is refused before the stream begins
        if body.stream:
            events = _events(body, frame, first, updates)
            return StreamingResponse(events, media_type="text/event-stream")
        choices = [Choice() for _ in wanted]
        choices[first[0]].add(first[1])
        async with contextlib.aclosing(updates):
            async for place, update in updates:
                choices[place].add(update)
                if await request.is_disconnected():
                    raise Refused(499, "the client has gone")
        return JSONResponse(frame.whole(choices))

    async def _watched(self, wanted: list[Wanted]) -> AsyncGenerator[tuple[int, Update], None]:
        """Updates, counted.

        Raises:
            Refused: for want of room or of a worker, or the model predicts no numbers.
        """
        metrics, times = self.metrics, Times(self.metrics)
        ended, began = 0, False
        try:
            async with contextlib.aclosing(self.worker.updates(wanted)) as updates:
                async for place, update in updates:
                    if not began:
                        metrics.prompt_tokens.inc(len(wanted[0].prompt))
                        metrics.reused_tokens.inc(update.reused)
                    began = True
                    times.saw(update)
                    if update.finish:
                        ended += 1
                        metrics.requests.labels(update.finish).inc()
                    if update.finish == "not finite":
                        raise Refused(500, "the model's predictions are not finite numbers")
                    yield place, update
        except Busy:
            raise Refused(429, "too many requests are waiting; try again later") from None
        except WorkerDead:
            raise Refused(503, "decoding has failed; the server must be restarted") from None
        finally:
            metrics.requests.labels("cancelled").inc(len(wanted) - ended if began else 0)


async def _events(
    body: Body,
    frame: Answer,
    first: tuple[int, Update],
    updates: AsyncGenerator[tuple[int, Update], None],
) -> AsyncIterator[str]:
    choices = [Choice() for _ in range(body.n)]

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    def piece(place: int, update: Update) -> str:
        before = len(choices[place].text)
        choices[place].add(update)
        said = update.text or update.finish or update.logprobs
        return event(frame.piece(place, update, before)) if said else ""

    async with contextlib.aclosing(updates):
        for role in frame.roles(body.n):
            yield event(role)
        try:
            yield piece(*first)
            async for place, update in updates:
                yield piece(place, update)
        except Refused as error:
            yield event(_error(error))
            return
    if body.stream_options and body.stream_options.include_usage:
        yield event(frame.usage_event(choices))
    yield "data: [DONE]\n\n"


def _error(refused: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    content = {"message": str(refused), "type": kind}
    return {"error": {**content, "param": refused.param or None, "code": refused.code or None}}


def _refusal(refused: Refused) -> JSONResponse:
    headers = {"Retry-After": "1"} if refused.status == 429 else None
    return JSONResponse(_error(refused), refused.status, headers)


def application(server: Server) -> FastAPI:
    """The routes. The worker runs as long as the application does."""

    @contextlib.asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.stop()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await server.answer(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await server.answer(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        row = {"id": server.name, "object": "model", "created": 0, "owned_by": "pangu"}
        return {"object": "list", "data": [{**row, "max_model_len": server.limits.length}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "ok" if server.worker.alive else "decoding has failed"
        return JSONResponse({"status": state}, 200 if server.worker.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page)

    _word_errors(app)
    app.add_middleware(_Gate, api_key=server.api_key, most_bytes=server.limits.body)
    return app


def _word_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return _refusal(Refused(400, f"{param}: {first['msg']}", param=param))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return _refusal(Refused(500, "the server has a fault; its log says which"))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return _refusal(Refused(error.status_code, str(error.detail)))


class _Gate:
    """Lets in what has the API key and is not too large, whatever it says of its length."""

    def __init__(self, app: Any, api_key: str, most_bytes: int) -> None:
        self._app, self._key, self._most = app, api_key.encode(), most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        guarded = self._key and scope["path"].startswith("/v1/")
        if guarded and not secrets.compare_digest(given, self._key):
            refused = Refused(401, "the API key is missing or wrong", "invalid_api_key")
            await _refusal(refused)(scope, receive, send)
            return
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > self._most:
                refused = Refused(413, f"a request has at most {self._most} bytes")
                await _refusal(refused)(scope, receive, send)
                return
        whole = iter([{"type": "http.request", "body": b"".join(chunks), "more_body": False}])

        async def replay() -> Any:
            return next(whole, None) or await receive()

        await self._app(scope, replay, send)
