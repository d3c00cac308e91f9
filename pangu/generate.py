"""Generate: `python -m pangu.generate checkpoint=DIR prompt="…" [key=value] …`.

One process, whatever layout the checkpoint was saved in.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.planning import InferenceConfig

if TYPE_CHECKING:
    from configs.schema import Config
    from pangu.data.tokenizer import Tokenizer
    from pangu.inference.batching import Request
    from pangu.inference.engine import Engine, Update
    from pangu.task_experts import TaskExperts

_AT_A_TIME = 32  # sequences
_PAGE = 16  # tokens

USAGE = """usage: python -m pangu.generate checkpoint=DIR [prompt=TEXT] [key=value] ...

  checkpoint          a run folder (its newest sound checkpoint) or one checkpoint's folder
  prompt              text to go on from; without one, a document from its beginning
  prompts             a file of prompts, one a line (of a .jsonl file the "prompt" of each), for all
                      at a time: prints JSON lines with prompt, text, finish (stop or length) and
                      document (prompt and text), in the file's order
  output              a file for those lines; one that is there already is gone on with, so that a
                      run that was stopped can be started again
  max_new_tokens      128; inference.max_new_tokens is the same
  temperature         0.8; 0 always takes the most likely token
  top_p               0.95; draws from the fewest tokens that are this likely together
  top_k               0; draws from so many most likely tokens; 0: from all
  min_p               0; draws from tokens that are this likely as a part of the most likely
  repetition_penalty  1; more than 1 makes tokens that the text holds less likely
  stop                a text to end before
  speculative         none | ngram | draft | mtp: guesses of the next tokens, for one pass, by
                      what followed the same tokens before, by a smaller model, or by the model's
                      own leap heads or layers of multi-token prediction; the text is the same
  speculative.tokens  4; guesses at a time; auto: for each pass as many as pay, by what passes take
                      and how many guesses hold, none where they do not
  speculative.tree    false; true: guesses branch, so that one place has several: the likeliest tree
                      of speculative.tokens guesses by what has held
  speculative.measured  a file for what was measured, as JSON: acceptance by place, and for each
                      number of sequences and guesses T_T, T_D, T_reject, σ, target efficiency and
                      the experts that a pass touches beside the expected N(t)
  draft               the smaller model's folder; it has the same tokenizer
  patterns            a store of python -m pangu.compress prune-experts: only the experts that
                      suit the prompt are read from the checkpoint
  task                auto; a pattern of the store, or generalist: the mean of all; auto: the
                      pattern that is nearest to the prompt
  keep                0.5; the part of the experts that is read
  batch_invariant     false; true: a text depends on neither the others nor how prompts are cut, in
                      any precision (GPU: slower kernels; on a CPU it is so with float32)
  seed                0; with several prompts, that of the first, 1 more for each
  backend             auto | cpu | cuda | npu
"""


SHARED = "inference.max_new_tokens="  # the simulator's key too
EXPERT_CHOICE = (
    "warning: with moe.router=expert_choice experts chose among all tokens of a batch in training; "
    "in generation they see one token at a time and choose otherwise"
)


@dataclass
class Options:
    """What to generate."""

    checkpoint: str
    prompt: str = ""
    prompts: str = ""
    output: str = ""
    max_new_tokens: int = InferenceConfig.max_new_tokens
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str = ""
    speculative: Literal["none", "ngram", "draft", "mtp"] = "none"
    speculative_tokens: int | Literal["auto"] = 4
    speculative_measured: str = ""
    speculative_tree: bool = False
    draft: str = ""
    patterns: str = ""
    task: str = "auto"
    keep: float = 0.5
    batch_invariant: bool = False
    seed: int = 0
    backend: Literal["auto", "cpu", "cuda", "npu"] = "auto"


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    from configs.violation import ConfigError
    from pangu.command_line import sentence

    try:
        options = parse(arguments)
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        if options.output:
            write(options)
            return 0
        for piece in stream(options):
            print(piece, end="", flush=True)
        if not options.prompts:
            print()
    except (ConfigError, PermissionError) as error:
        print(sentence(error), file=sys.stderr)
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
    from pangu.command_line import read_options, refuse, speculation_ranges, task_ranges

    own = [
        word.removeprefix("inference.") if word.startswith(SHARED) else word for word in arguments
    ]
    found, violations = read_options(Options, own)
    ranges = {
        "max_new_tokens": (found.max_new_tokens > 0, "a number of tokens is positive"),
        "temperature": (0 <= found.temperature < math.inf, "must be 0 or more"),
        "top_p": (0 < found.top_p <= 1, "a probability is more than 0 and at most 1"),
        "top_k": (found.top_k >= 0, "must be 0 or more"),
        "min_p": (0 <= found.min_p <= 1, "a part is 0 to 1"),
        "repetition_penalty": (0 < found.repetition_penalty < math.inf, "must be more than 0"),
        "prompts": (not (found.prompt and found.prompts), "give either prompt or prompts"),
        "output": (bool(found.prompts or not found.output), "takes answers to prompts=FILE"),
        "seed": (0 <= found.seed < 2**63, "must be 0 or more"),
    }
    guesses = speculation_ranges(
        found.speculative, found.speculative_tokens, found.draft, found.speculative_tree
    )
    tasks = task_ranges(found.patterns, found.task, found.keep)
    refuse(found, violations, ranges | guesses | tasks)
    return found


def write(options: Options) -> None:
    """The answers that are still missing in `options.output`.

    Raises:
        ConfigError: as `stream`; or the file cannot be used.
    """
    from configs.violation import ConfigError, Violation
    from pangu.inference.answers import AnswersError, take_up

    prompts = _prompts(options)
    try:
        file, done = take_up(Path(options.output), prompts)
    except AnswersError as error:
        raise ConfigError([Violation("output", options.output, str(error))]) from None
    with file:
        if done < len(prompts):
            for line in stream(options, done):
                file.write(line)
                file.flush()
    print(f"{options.output}: {len(prompts)} answers, {done} from before", file=sys.stderr)


def stream(options: Options, done: int = 0) -> Iterator[str]:
    """The prompt and what the model adds to it, as pieces of text; with several prompts, lines, but
    of the first `done` of them.

    Raises:
        ConfigError: the backend is missing, the checkpoint or the prompts cannot be used, or a
            text would be longer than the model was made for.
    """
    from pangu.task_experts import choice_of, opened
    from pangu.trained_model import add_drafter, keep_one_order

    prompts = _prompts(options)
    tasks = choice_of(options.patterns, options.task, options.keep)
    with opened(Path(options.checkpoint), options.backend, tasks) as (trained, experts):
        model, tokenizer, config = trained
        if config.model.num_experts and config.moe.router == "expert_choice":
            print(EXPERT_CHOICE, file=sys.stderr)
        from pangu.inference.engine import Engine

        if options.batch_invariant:
            keep_one_order()
        requests = [
            _request(options, number, prompt, tokenizer, config.model.max_position_embeddings)
            for number, prompt in enumerate(prompts[done:], done)
        ]
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine = Engine(
            model,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
            cache_tokens=max(longest, min(len(requests), _AT_A_TIME) * (longest + _PAGE)),
            max_sequences=_AT_A_TIME,
        )
        guesses = (options.speculative, options.speculative_tokens, options.draft)
        add_drafter(engine, *guesses, config, branch=options.speculative_tree)
        if options.speculative_measured:
            engine.count_experts()
        updates = _updates(engine, requests, experts, options)
        if options.prompts:
            yield from _lines(updates, prompts[done:])
        else:
            yield options.prompt
            yield from (update.text for _, update in updates)
        if options.speculative_measured:
            _write_measured(engine, config, options)


def _write_measured(engine: Engine, config: Config, options: Options) -> None:
    from configs.violation import ConfigError, Violation
    from simulator.api import active_experts

    model, top_k = config.model, config.moe.top_k
    found = engine.counts.measured.report(
        lambda tokens: float(active_experts(tokens, model.num_experts, top_k))
    )
    try:
        Path(options.speculative_measured).write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        wrong = Violation("speculative.measured", options.speculative_measured, reason)
        raise ConfigError([wrong]) from None


def _prompts(options: Options) -> list[str]:
    from configs.violation import ConfigError, Violation
    from pangu.inference.answers import AnswersError, read_prompts

    if not options.prompts:
        return [options.prompt]
    try:
        return read_prompts(Path(options.prompts))
    except AnswersError as error:
        raise ConfigError([Violation("prompts", options.prompts, str(error))]) from None


def _request(
    options: Options, number: int, prompt: str, tokenizer: Tokenizer, longest: int
) -> Request:
    from configs.violation import ConfigError, Violation
    from pangu.inference.batching import Request
    from pangu.inference.sampling import Sampling

    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    if len(ids) + options.max_new_tokens > longest:
        room = max(0, longest - len(ids))
        reason = f"the prompt takes {len(ids)} of the model's {longest} positions"
        hint = f"at most {room}" if room else "a shorter prompt"
        raise ConfigError([Violation("max_new_tokens", options.max_new_tokens, reason, hint)])
    return Request(
        prompt=tuple(ids),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(
            repetition_penalty=options.repetition_penalty,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed + number,
        ),
        stop_tokens=frozenset({tokenizer.eod}),
        stop=(options.stop,) if options.stop else (),
    )


def _updates(
    engine: Engine, requests: list[Request], experts: TaskExperts | None, options: Options
) -> Iterator[tuple[int, Update]]:
    """Updates, with the place of the request that each belongs to; one task's requests after the
    other's. The first task's experts are there at once."""
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(experts.task_of(request.prompt) if experts else "", []).append(place)
    if experts:
        _hold(experts, next(iter(places)), engine)
    return _decoded(engine, requests, places, experts, options)


def _decoded(
    engine: Engine,
    requests: list[Request],
    places: dict[str, list[int]],
    experts: TaskExperts | None,
    options: Options,
) -> Iterator[tuple[int, Update]]:
    from configs.violation import ConfigError, Violation

    for task, group in places.items():
        if experts and task != experts.task:
            _hold(experts, task, engine)
        place_of = {engine.add(requests[place]): place for place in group}
        while engine.busy:
            for update in engine.step():
                if update.finish == "not finite":
                    reason = "the model's predictions are not finite numbers"
                    raise ConfigError([Violation("checkpoint", options.checkpoint, reason)])
                yield place_of[update.number], update


def _hold(experts: TaskExperts, task: str, engine: Engine) -> None:
    experts.hold(task)
    engine.forget()
    read = f"{experts.bytes_read:,} bytes of the checkpoint read so far"
    print(f"experts of {task}: {read}", file=sys.stderr)


def _lines(updates: Iterator[tuple[int, Update]], prompts: Sequence[str]) -> Iterator[str]:
    """A JSON line for each prompt, in order, each as soon as those before it are done."""
    from pangu.inference.answers import answer

    texts = [""] * len(prompts)
    finished = [""] * len(prompts)
    next_ = 0
    for place, update in updates:
        texts[place] += update.text
        finished[place] = update.finish
        while next_ < len(prompts) and finished[next_]:
            yield answer(prompts[next_], texts[next_], finished[next_])
            next_ += 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there is any text
        sys.exit(130)
