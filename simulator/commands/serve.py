"""`python -m simulator serve`: the planner as a local page."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any free.")] = 8765,
) -> None:
    """Serve a page on this machine to choose model, cluster and limits and to see the layouts."""
    from simulator import local_server
    from simulator.planner_server import PlannerServer

    local_server.serve(port, PlannerServer)
