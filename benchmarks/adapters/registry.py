"""The peers: where they come from, what they are asked, and running one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adapters import for_calculon, for_llm_analysis, for_simumax
from configs.schema import Config

Settings = Callable[[Config], dict[str, Any]]
# Settings and seconds to the peer's answers and the seconds it took.
Answer = Callable[[list[dict[str, Any]], float], tuple[list[dict[str, Any]], float]]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
HERE = Path(__file__).parent


class PeerError(RuntimeError):
    """A peer that does not run here; one sentence."""


@dataclass(frozen=True)
class Peer:
    """Another simulator. `variants` are the settings under which its error is taken, `sweeps`
    those under which it is timed, each by the name it has in the tables; `about` says what its
    numbers rest on."""

    name: str
    option: str
    address: str
    needs: str  # packages, beside numpy, that it imports
    variants: dict[str, Settings]
    sweeps: dict[str, Settings]
    about: str


def _any_device(config: Config) -> dict[str, Any]:
    """SimuMax with its B200 file, whatever the device: how long it thinks is the same."""
    return for_simumax.settings(config, "b200_bf16_ceperm")


PEERS = (
    Peer(
        name="Calculon",
        option="calculon",
        address="https://github.com/calculon-ai/calculon",
        needs="psutil",
        variants={"Calculon": for_calculon.settings},
        sweeps={"Calculon": for_calculon.settings},
        about="Dense GPT layers, without embedding and head. Its A100 file is the one with which"
        " it validates itself on Korthikanti's eight rows; the means and maxima that its"
        " `llm-validation` prints for them (3.65 % and 8.87 %) come out here too. Its memory limit"
        " is lifted, since it gives no time for what it holds too large.",
    ),
    Peer(
        name="SimuMax",
        option="simumax",
        address="https://github.com/MooreThreads/SimuMax",
        needs="pandas sympy tabulate matplotlib graphviz tqdm",
        variants={"SimuMax": for_simumax.settings},
        sweeps={
            "SimuMax": _any_device,
            "SimuMax, profile caches on": lambda config: _any_device(config) | {"cached": True},
        },
        about="Its B200 file holds efficiencies that were measured, operator shape by operator"
        " shape, on the machine on which its own rows were measured; other shapes take a default."
        " Set as in its B200 scripts. Its other machine, A100 PCIe, has no row here.",
    ),
    Peer(
        name="llm-analysis",
        option="llm_analysis",
        address="https://github.com/cli99/llm-analysis",
        needs="fire",
        variants={
            "llm-analysis": for_llm_analysis.settings,
            "llm-analysis, by FLOPs alone": partial(
                for_llm_analysis.settings, answer="latency_per_iter_using_flops"
            ),
            "llm-analysis, efficiency 1": partial(
                for_llm_analysis.settings, efficiencies=for_llm_analysis.DEFAULT
            ),
        },
        sweeps={"llm-analysis": for_llm_analysis.settings},
        about="A user supplies the efficiencies. Here: what its documentation suggests where"
        " nothing was measured (half of the matrix peak, 0.9 of the memory bandwidth), and its"
        " defaults of 1, with which it calls its result a lower bound. No pipeline bubble, no"
        " reduction of gradients, one expert's FLOPs per token whatever top-k. It gives two times,"
        " by operator and by FLOPs alone; the second is what its published examples hold.",
    ),
)


def ask(
    peer: Peer, folder: Path, python: str, questions: list[dict[str, Any]], seconds: float
) -> tuple[list[dict[str, Any]], float]:
    """The peer's answers to settings, as many as it gives in so many seconds, and the seconds.

    Raises:
        PeerError: it does not run.
    """
    script = HERE / f"for_{peer.option}.py"
    command = [python, str(script), str(folder.resolve()), str(seconds)]
    try:
        run = subprocess.run(
            command,
            input=json.dumps(questions),
            capture_output=True,
            text=True,
            env=os.environ | ONE_THREAD,
        )
    except OSError as error:
        raise PeerError(f"{peer.name} was not run: {error}") from error
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no reason given"
        raise PeerError(
            f"{peer.name} does not run in {python} ({reason}); it imports numpy {peer.needs}:"
            " name an interpreter that has them with --python"
        )
    result = json.loads(run.stdout)
    return result["answers"], result["seconds"]


def version(folder: Path) -> str:
    """The checkout's commit."""
    if not (folder / ".git").exists():
        return "unknown commit"
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h of %cs"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
