"""Serve: `python -m pangu.serve checkpoint=DIR [key=value] …`, with OpenAI's API.

One process or those of a launcher, whatever layout the checkpoint was saved in.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch import environment
from launch.environment import LauncherError, ProcessEnvironment

if TYPE_CHECKING:
    from pangu.inference.engine import Engine
    from pangu.serving.chat import ChatFormat
    from pangu.serving.server import Server
    from pangu.task_experts import TaskExperts
    from pangu.trained_model import Trained

_HEAD_START = 1.0  # seconds
_PATIENCE = 10.0  # seconds without requests after which rank 0 looks whether all are there

USAGE = """usage: python -m pangu.serve checkpoint=DIR [key=value] ...

  checkpoint          a run folder (its newest sound checkpoint) or one checkpoint's folder
  port                8000; 0 takes a free one and prints it
  host                127.0.0.1
  name                what clients call the model; its configuration's name if not given
  chat_template       a Jinja file; the one that came with the model if not given
  api_key_file        a file whose first line clients must send as their API key
  max_length          tokens of a prompt and its answer; at most, and if not given, the model's
  max_sequences       32; sequences decoded at a time
  max_batch_tokens    512; tokens that a pass computes
  max_queue           128; requests that may wait; more are told to come again (429)
  max_body            1048576; bytes of a request
  cache_tokens        16384; tokens whose keys and values are kept, of all sequences together
  drain               60; seconds that answers under way have to end when told to stop (SIGTERM)
  speculative         none | ngram | draft | mtp, as python -m pangu.generate has it
  speculative.tokens  4, or auto
  speculative.tree    false; true: guesses branch
  draft               the smaller model's folder
  patterns            a store of python -m pangu.compress prune-experts: the experts that suit a
                      prompt are read from the checkpoint when it comes; requests of one task are
                      decoded together, those of another after them
  task                auto, as python -m pangu.generate has it
  keep                0.5; the part of the experts that is held
  batch_invariant     false, or true, as python -m pangu.generate has it
  backend             auto | cpu | cuda | npu

in several processes: torchrun --nproc_per_node=4 -m pangu.serve checkpoint=DIR ...

  parallel.tensor_model_parallel_size  1; processes that hold a replica together; replicas decode
                      different requests, with max_sequences and cache_tokens each
  parallel.expert_model_parallel_size  1; processes, of all replicas, that divide the experts
  launch.timeout_minutes  10; how long a process may keep the others waiting
"""


@dataclass
class Options:
    """What to serve."""

    checkpoint: str
    port: int = 8000
    host: str = "127.0.0.1"
    name: str = ""
    chat_template: str = ""
    api_key_file: str = ""
    max_length: int = 0
    max_sequences: int = 32
    max_batch_tokens: int = 512
    max_queue: int = 128
    max_body: int = 2**20
    cache_tokens: int = 16384
    drain: int = 60
    speculative: Literal["none", "ngram", "draft", "mtp"] = "none"
    speculative_tokens: int | Literal["auto"] = 4
    speculative_tree: bool = False
    draft: str = ""
    patterns: str = ""
    task: str = "auto"
    keep: float = 0.5
    batch_invariant: bool = False
    backend: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    parallel_tensor_model_parallel_size: int = 1
    parallel_expert_model_parallel_size: int = 1
    launch_timeout_minutes: float = 10.0


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 told to stop, 1 decoding has failed, 2 a mistake of the user's."""
    if environment.is_msrun_scheduler(os.environ):
        return 0
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    from configs.violation import ConfigError
    from pangu.command_line import sentence

    try:
        process = environment.read(os.environ)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return 0 if serve(parse(arguments), process) else 1
    except (ConfigError, PermissionError) as error:  # the same on every rank
        if process.rank == 0:
            print(sentence(error), file=sys.stderr)
            environment.report_refusal(os.environ, sentence(error))
        else:  # a launcher ends the others once one has left: the one that speaks comes first
            time.sleep(_HEAD_START)
        return 2


def parse(arguments: Sequence[str]) -> Options:
    """Options of the command line.

    Raises:
        ConfigError: naming every argument that is unknown, malformed or out of range.
    """
    from pangu.command_line import read_options, refuse, speculation_ranges, task_ranges

    found, violations = read_options(Options, arguments)
    positive = ["max_sequences", "max_batch_tokens", "max_body", "cache_tokens", "drain"]
    positive += [f"parallel_{kind}_model_parallel_size" for kind in ("tensor", "expert")]
    positive += ["launch_timeout_minutes"]
    ranges = {name: (getattr(found, name) > 0, "must be more than 0") for name in positive} | {
        "port": (0 <= found.port < 2**16, "a port is 0 to 65535"),
        "max_length": (found.max_length >= 0, "must be more than 0"),
        "max_queue": (found.max_queue >= 0, "must be 0 or more"),
        "batch_invariant": (
            not found.batch_invariant or found.parallel_tensor_model_parallel_size == 1,
            "sums over tensor-parallel ranks are made in an order that depends on their size",
        ),
    }
    guesses = speculation_ranges(
        found.speculative, found.speculative_tokens, found.draft, found.speculative_tree
    )
    tasks = task_ranges(found.patterns, found.task, found.keep)
    refuse(found, violations, ranges | guesses | tasks)
    return found


def serve(options: Options, process: ProcessEnvironment) -> bool:
    """Answer until told to stop by SIGTERM or SIGINT; answers under way then have `drain` seconds
    to end. Of several processes rank 0 does, and the others decode for it. False: decoding failed.

    Raises:
        ConfigError: the backend or the packages are missing, or a file cannot be used.
    """
    from configs.violation import ConfigError, Violation
    from pangu.task_experts import choice_of, opened
    from pangu.trained_model import Layout

    if not importlib.util.find_spec("uvicorn"):
        reason = 'serving needs more packages: pip install "pangu-moe[train,serve]"'
        raise ConfigError([Violation("port", options.port, reason)])
    key = _api_key(options)
    tasks = choice_of(options.patterns, options.task, options.keep)
    tensor, expert = (
        options.parallel_tensor_model_parallel_size,
        options.parallel_expert_model_parallel_size,
    )
    layout = None
    if max(process.world_size, tensor, expert) > 1:
        layout = Layout(process, tensor, expert, options.launch_timeout_minutes)
    if layout and tasks:
        reason = f"experts of tasks are read by one process, and here are {process.world_size}"
        raise ConfigError([Violation("patterns", options.patterns, reason)])
    with opened(Path(options.checkpoint), options.backend, tasks, layout) as (trained, experts):
        _checked(options, trained)  # on all ranks alike
        engine = _engine(options, trained, layout is not None)
        if process.rank > 0:
            from pangu.serving.replicas import follow

            follow(engine)
            return True
        server = _server(options, key, trained, engine, experts)
        _listen(options, server)
        return not server.worker.failed


def _listen(options: Options, server: Server) -> None:
    """Until told to stop."""
    import uvicorn

    from pangu.serving.server import application

    class Listening(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for server in getattr(self, "servers", []):
                host, port = server.sockets[0].getsockname()[:2]
                print(f"serving on http://{host}:{port}", flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            self._captured_signals.clear()  # or the process would end by the signal

    Listening(
        uvicorn.Config(
            application(server),
            host=options.host,
            port=options.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=options.drain,
        )
    ).run()


def _api_key(options: Options) -> str:
    from configs.violation import ConfigError, Violation

    if not options.api_key_file:
        return ""
    try:
        key = Path(options.api_key_file).read_text(encoding="utf-8").partition("\n")[0].strip()
        reason = "" if key else "its first line is empty"
    except (OSError, UnicodeDecodeError) as error:
        key, reason = "", str(error)
    if reason:
        raise ConfigError([Violation("api_key_file", options.api_key_file, reason)])
    return key


def _engine(options: Options, trained: Trained, several: bool) -> Engine:
    """This rank's. Collective."""
    from pangu.inference.engine import Engine
    from pangu.inference.replicas import Replica
    from pangu.trained_model import add_drafter, keep_one_order

    if options.batch_invariant:
        keep_one_order()
    model, tokenizer, config = trained
    engine = Engine(
        model,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        cache_tokens=options.cache_tokens,
        max_sequences=options.max_sequences,
        max_batch_tokens=options.max_batch_tokens,
        replica=Replica(config) if several else None,
    )
    guesses = (options.speculative, options.speculative_tokens, options.draft)
    add_drafter(engine, *guesses, config, branch=options.speculative_tree)
    return engine


def _server(
    options: Options,
    api_key: str,
    trained: Trained,
    engine: Engine,
    experts: TaskExperts | None = None,
) -> Server:
    from pangu.serving.replicas import Replicas
    from pangu.serving.server import Limits, Server
    from pangu.serving.worker import Worker

    longest, chat = _checked(options, trained)
    replicas = engine.replica.count if engine.replica else 1
    timeout = 60 * options.launch_timeout_minutes
    worker = Worker(
        Replicas(engine) if engine.replica else engine,
        options.max_sequences * replicas + options.max_queue,
        experts,
        patience=min(_PATIENCE, timeout / 4) if engine.replica else None,
    )
    return Server(
        worker=worker,
        tokenizer=trained.tokenizer,
        name=options.name or trained.config.model.name,
        limits=Limits(options.max_length or longest, options.max_body),
        chat=chat,
        api_key=api_key,
    )


def _checked(options: Options, trained: Trained) -> tuple[int, ChatFormat | None]:
    """The longest text, and how chats are written.

    Raises:
        ConfigError: what was asked for does not fit the model.
    """
    from configs.violation import ConfigError, Violation
    from pangu.serving.chat import TemplateError, chat_format

    longest = min(trained.config.model.max_position_embeddings, options.cache_tokens)
    if options.max_length > longest:
        reason = f"the model and cache_tokens={options.cache_tokens} allow {longest}"
        raise ConfigError([Violation("max_length", options.max_length, reason, str(longest))])
    try:
        folder = Path(options.checkpoint)
        return longest, chat_format(folder, trained.tokenizer, options.chat_template)
    except TemplateError as error:
        raise ConfigError([Violation("chat_template", options.chat_template, str(error))]) from None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
