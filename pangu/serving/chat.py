"""A conversation as tokens, by the template that came with the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pangu.data.tokenizer import HuggingFaceTokenizer, Tokenizer

_MARK = "\ue000"  # private use: no text means anything by it


class TemplateError(Exception):
    """A conversation that the template does not take; the message is one sentence."""


class ChatFormat:
    """The template of a model's `huggingface/` folder.

    `stop_tokens`: what ends an answer. A text that spells a special token out does not become one.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, names: dict[str, str]) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._template = environment.from_string(template)
        self._tokenizer, self._names = tokenizer, names
        self._special: dict[str, int] = {}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._special = tokenizer.special_tokens
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        ends = {tokenizer.eod, self._special.get(names.get("eos_token", ""), tokenizer.eod)}
        self.stop_tokens = frozenset(ends)

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens up to where the assistant's answer begins.

        Raises:
            TemplateError: the template refuses the messages.
        """
        from jinja2 import TemplateError as JinjaError

        plain = [{**message, "content": self._disarmed(message["content"])} for message in messages]
        try:
            text = self._template.render(messages=plain, add_generation_prompt=True, **self._names)
        except (JinjaError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template does not take the messages: {error}") from None
        tokens, end = [], 0
        for match in self._pattern.finditer(text):
            tokens += self._plain(text[end : match.start()])
            tokens.append(self._special[match[0]])
            end = match.end()
        return tokens + self._plain(text[end:])

    def _disarmed(self, content: str) -> str:
        content = content.replace(_MARK, "")
        return self._pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], content)

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.replace(_MARK, "")) if text else []


def _refuse(message: str) -> None:
    raise TemplateError(f"the chat template says: {message}")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def chat_format(folder: Path, tokenizer: Tokenizer, file: str = "") -> ChatFormat | None:
    """The template in `file`, or else the one that came with the model in `folder`; None when there
    is none.

    Raises:
        TemplateError: it cannot be read.
    """
    from jinja2 import TemplateError as JinjaError

    settings: dict[str, Any] = {}
    try:
        if (path := folder / "huggingface" / "tokenizer_config.json").is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        beside = folder / "huggingface" / "chat_template.jinja"
        if file or beside.is_file():
            template = Path(file or beside).read_text(encoding="utf-8")
        if isinstance(template, list):  # several by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if not template:
            return None
        names = {
            key: value if isinstance(value, str) else value["content"]
            for key, value in settings.items()
            if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value
        }
        return ChatFormat(template, tokenizer, names)
    except (OSError, ValueError, KeyError, TypeError, JinjaError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}") from None
