"""A short trial of our own kernels before a model is built: what fails it runs in its plain form.

A compiler's fault, a driver or a card that nobody tried must cost speed, not a run or its result.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from pangu import backends
from pangu.backends import Operators
from pangu.ops.cases import TOLERANCES, cases, compared

TRITON = "triton"


def keep_what_holds(plain: Operators) -> str:
    """Run each operator that has a Triton kernel once, forward and backward, against its reference
    on the host; those that raise or differ take their variant of `plain` from now on. A line that
    says which, or nothing."""
    ours = backends.current().operators
    tried = {name for name, variant in asdict(ours).items() if variant == TRITON}
    if not tried:
        return ""
    own = (case for case in cases() if case.operator in tried)
    outcomes = [compared(case, dtype) for case in own for dtype in TOLERANCES]
    failed = {each.operator: each for each in outcomes if not each.holds}
    if not failed:
        return ""
    backends.use(replace(ours, **{name: getattr(plain, name) for name in failed}))
    reasons = (f"{name} ({each.reason})" for name, each in failed.items())
    return f"these operators run in their plain forms: {', '.join(reasons)}"
