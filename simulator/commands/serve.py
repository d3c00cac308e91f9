"""`python -m simulator serve`: the planner as a local page."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any free.")] = 8765,
) -> None:
    """Serve a page on this machine to choose model, cluster and limits and to see the layouts."""
    from configs.violation import ConfigError, Violation
    from simulator.planner_server import PlannerServer

    try:
        server = PlannerServer(port)
    except OSError as error:
        reason = f"cannot be listened on: {error.strerror}"
        raise ConfigError(
            [Violation("--port", port, reason, "--port 0 takes a free one")]
        ) from None
    print(f"http://{server.names[0]}/ (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
