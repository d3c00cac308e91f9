"""From updates of the engine to what OpenAI's clients read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pangu.data.tokenizer import Tokenizer
from pangu.inference.drawing import Likely
from pangu.inference.engine import Update


@dataclass
class Choice:
    """One of the texts asked for, as far as it has come."""

    text: str = ""
    tokens: int = 0
    finish: str = ""
    reused: int = 0
    logprobs: list[Likely] = field(default_factory=list)

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += len(update.tokens)
        self.finish, self.reused = update.finish, update.reused
        self.logprobs += update.logprobs


@dataclass
class Answer:
    """The frame of one request's answer: `chat` or a plain completion, of `model`."""

    model: str
    chat: bool
    tokenizer: Tokenizer
    prompt_tokens: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer that is not streamed."""
        rows = []
        for index, choice in enumerate(choices):
            row = {"index": index, "finish_reason": choice.finish}
            row["logprobs"] = self._logprobs(choice.logprobs, 0)
            if self.chat:
                row["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                row["text"] = choice.text
            rows.append(row)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._frame(kind), "choices": rows, "usage": self._usage(choices)}

    def piece(self, index: int, update: Update, before: int) -> dict[str, Any]:
        """An event of a stream; `before`: characters of the choice so far."""
        row: dict[str, Any] = {"index": index, "finish_reason": update.finish or None}
        row["logprobs"] = self._logprobs(update.logprobs, before)
        if self.chat:
            row["delta"] = {"content": update.text}
        else:
            row["text"] = update.text
        return {**self._frame(self._chunk), "choices": [row]}

    def roles(self, count: int) -> list[dict[str, Any]]:
        """The events that begin a chat's stream."""
        row = {"finish_reason": None, "logprobs": None}
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [
            {**self._frame(self._chunk), "choices": [{"index": index, **row, **delta}]}
            for index in range(count if self.chat else 0)
        ]

    def usage_event(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last event of a stream, when it was asked for."""
        return {**self._frame(self._chunk), "choices": [], "usage": self._usage(choices)}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _frame(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        frame = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created}
        return {**frame, "model": self.model}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        drawn = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "prompt_tokens_details": {"cached_tokens": choices[0].reused},
        }

    def _logprobs(self, found: Sequence[Likely], offset: int) -> dict[str, Any] | None:
        if not found:
            return None
        decode = self.tokenizer.decode
        if self.chat:
            return {"content": [self._token_logprob(likely) for likely in found], "refusal": None}
        texts = [decode([likely.token]) for likely in found]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [likely.logprob for likely in found],
            # Parts of a character have one text in common: the most likely is told.
            "top_logprobs": [
                {decode([token]): logprob for token, logprob in reversed(likely.top)}
                for likely in found
            ],
            "text_offset": offsets,
        }

    def _token_logprob(self, likely: Likely) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [entry(token, logprob) for token, logprob in likely.top]
        return {**entry(likely.token, likely.logprob), "top_logprobs": top}
