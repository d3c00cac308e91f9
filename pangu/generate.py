"""Generate: `python -m pangu.generate checkpoint=DIR prompt="…" [key=value] …`.

One process, whatever layout the checkpoint was saved in.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

USAGE = """usage: python -m pangu.generate checkpoint=DIR [prompt=TEXT] [key=value] ...

  checkpoint      a run folder (its newest sound checkpoint) or one checkpoint's folder
  prompt          text to go on from; without one, a document from its beginning
  max_new_tokens  128
  temperature     0.8; 0 always takes the most likely token
  top_p           0.95; draws from the fewest tokens that are this likely together
  seed            0
  backend         auto | cpu | cuda | npu
"""


EXPERT_CHOICE = (
    "warning: with moe.router=expert_choice experts chose among all tokens of a batch in training; "
    "in generation they see one token at a time and choose otherwise"
)


@dataclass
class Options:
    """What to generate."""

    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    backend: Literal["auto", "cpu", "cuda", "npu"] = "auto"


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    from configs.violation import ConfigError

    try:
        options = parse(arguments)
        text = stream(options)
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        for piece in text:
            print(piece, end="", flush=True)
        print()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print()
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Options of the command line.

    Raises:
        ConfigError: naming every argument that is unknown, malformed or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    from configs.violation import ConfigError, Violation

    known = [field.name for field in fields(Options)]
    given = {}
    violations = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in known and equals:
            given[key] = value
        else:
            reason = "unknown key" if equals else "is not of the form key=value"
            violations.append(Violation(key, value, reason, f"known: {', '.join(known)}"))
    if "checkpoint" not in given:
        reason = "what to generate with is missing"
        violations.append(Violation("checkpoint", "", reason, "checkpoint=RUN_DIR"))
    options = {"checkpoint": ""} | given
    try:
        found = TypeAdapter(Options).validate_python(options)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            violations.append(Violation(key, item["input"], item["msg"].lower()))
            del options[key]
        found = TypeAdapter(Options).validate_python(options)
    ranges = {
        "max_new_tokens": (found.max_new_tokens > 0, "a number of tokens is positive"),
        "temperature": (0 <= found.temperature < math.inf, "must be 0 or more"),
        "top_p": (0 < found.top_p <= 1, "a probability is more than 0 and at most 1"),
        "seed": (0 <= found.seed < 2**63, "must be 0 or more"),
    }
    violations += [
        Violation(key, getattr(found, key), reason)
        for key, (fits, reason) in ranges.items()
        if not fits
    ]
    if violations:
        raise ConfigError(violations)
    return found


def stream(options: Options) -> Iterator[str]:
    """The prompt and what the model adds to it, as pieces of text.

    Raises:
        ConfigError: the backend is missing, the checkpoint cannot be used, or the text would be
            longer than the model was made for.
    """
    from configs.violation import ConfigError, Violation
    from pangu.trained_model import loaded

    with loaded(Path(options.checkpoint), options.backend) as (model, tokenizer, config):
        if config.model.num_experts and config.moe.router == "expert_choice":
            print(EXPERT_CHOICE, file=sys.stderr)
        from pangu.data.tokenizer import StreamDecoder
        from pangu.inference.decode import NotFinite, generate
        from pangu.inference.sampling import Sampler

        prompt = tokenizer.encode(options.prompt) or [tokenizer.eod]
        longest = config.model.max_position_embeddings
        if len(prompt) + options.max_new_tokens > longest:
            room = max(0, longest - len(prompt))
            reason = f"the prompt takes {len(prompt)} of the model's {longest} positions"
            hint = f"at most {room}" if room else "a shorter prompt"
            raise ConfigError([Violation("max_new_tokens", options.max_new_tokens, reason, hint)])
        yield options.prompt
        decoder = StreamDecoder(tokenizer)
        sampler = Sampler(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        try:
            for token in generate(
                model,
                prompt,
                sampler,
                max_new_tokens=options.max_new_tokens,
                vocab_size=tokenizer.vocab_size,
                eod=tokenizer.eod,
            ):
                yield decoder.push(token)
        except NotFinite as error:
            violation = Violation("checkpoint", options.checkpoint, str(error))
            raise ConfigError([violation]) from None
        yield decoder.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there is any text
        sys.exit(130)
