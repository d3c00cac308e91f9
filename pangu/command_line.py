"""What the typer command lines share: a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import sys

import typer


def run(app: typer.Typer, arguments: list[str], *mistakes: type[Exception]) -> int:
    """The exit code of `app`: 0 done, 2 one of `mistakes` or wrong words on the command line."""
    try:
        return app(arguments, standalone_mode=False) or 0
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
    except typer.Exit as leave:
        return leave.exit_code
    except Exception as error:
        if not hasattr(error, "show"):  # click's own
            raise
        error.show()
    return 2
