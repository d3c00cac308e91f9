"""`python -m simulator COMMAND key=value …`: plan a run without a device."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import typer

from simulator.commands import COMMANDS


def application(arguments: list[str]) -> typer.Typer:
    """The command line. Only the named command is loaded, or all of them for the help."""
    app = typer.Typer(
        name="simulator",
        help="Plan a Mixture-of-Experts run: time, memory, layout, shape. No device needed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    named = [argument for argument in arguments if argument in COMMANDS][:1]
    for name in named or COMMANDS:
        module = f"simulator.commands.{name}"
        if importlib.util.find_spec(module):
            app.command(name)(getattr(importlib.import_module(module), name))
    app.callback()(lambda: None)  # a command keeps its name where it is the only one loaded
    return app


def main() -> None:
    """Run a command; a mistake of the user's is one sentence and exit code 2."""
    from configs.violation import ConfigError

    try:
        application(sys.argv[1:])()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
