"""What clients send, as OpenAI's API has it. Keys that would be ignored are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    """`include_usage`: the last event tells the tokens used."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completion take; `top_k`, `min_p` and `repetition_penalty` are additions
    that many servers know. `user`, `metadata` and `store` change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Body):
    """`POST /v1/completions`. `prompt`: a text or its tokens."""

    prompt: Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: Count = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top_logprobs_count(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[Text, Field(min_length=1)]
    content: Text | list[TextPart]
    name: Text | None = None

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in parts)
        named = {"name": self.name} if self.name else {}
        return {"role": self.role, "content": content, **named}


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def top_logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
