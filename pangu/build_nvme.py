"""Build what `engine.offload=nvme` needs: `python -m pangu.build_nvme [--minutes 60]`.

DeepSpeed's operator for asynchronous files is compiled into a folder of this project's, once for
an installation of DeepSpeed and torch. A build that is ended goes on with the next call.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from configs.violation import ConfigError, Violation
from pangu import machine_check
from pangu.command_line import run
from pangu.engines.deepspeed import async_io

app = typer.Typer(add_completion=False, help=__doc__)


class Backend(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    NPU = "npu"


@app.command()
def build(
    minutes: Annotated[float, typer.Option(min=0.01, help="after which the build is ended")] = 60,
    backend: Annotated[Backend, typer.Option(help="of the runs that will use it")] = Backend.AUTO,
) -> None:
    """Compile DeepSpeed's operator for NVMe drives."""
    if why := machine_check.unusable_deepspeed():
        hint = "pip install 'pangu-moe[deepspeed]'"
        raise ConfigError([Violation("engine.name", "deepspeed", why, hint)])
    name = machine_check.backend(backend.value)[0]
    try:
        print(f"DeepSpeed's operator for NVMe is in {async_io.build(name, minutes)}")
    except async_io.NotBuilt as error:
        raise ConfigError([Violation("engine.offload", "nvme", str(error))]) from None


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 what keeps it from being done."""
    return run(app, arguments, ConfigError)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
