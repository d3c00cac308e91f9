"""Runs one peer over many settings: a JSON list on standard input, forecasts on standard output.

Standard library only: this is executed by the peer's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Evaluate = Callable[[dict[str, Any]], dict[str, float]]


def serve(open_peer: Callable[[Path], Evaluate]) -> None:
    """`python for_PEER.py CHECKOUT SECONDS`: stops after so many seconds, saying how many it did.

    Importing the peer and its first forecast, which fills its caches, are not timed.
    """
    folder, budget = Path(sys.argv[1]).resolve(), float(sys.argv[2])
    questions = json.load(sys.stdin)
    sys.path.insert(0, str(folder))
    # Peers print while they work.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        evaluate = open_peer(folder)
        _answer(evaluate, questions[0])
        answers = []
        start = time.perf_counter()
        for question in questions:
            answers.append(_answer(evaluate, question))
            if time.perf_counter() - start > budget:
                break
        seconds = time.perf_counter() - start
    json.dump({"answers": answers, "seconds": seconds}, sys.stdout)


def _answer(evaluate: Evaluate, question: dict[str, Any]) -> dict[str, Any]:
    # Whatever a peer refuses a layout with (assertions, its own exceptions) is its answer.
    try:
        return dict(evaluate(question))
    except Exception as error:
        return {"reason": str(error).splitlines()[0] if str(error) else type(error).__name__}
