"""`python -m pangu.doctor [the arguments of pangu.train]`: what a run would meet, before it runs.

Every violation of the configuration, the process groups it resolves to, parameters per rank, and
the installation. Imports no torch and enumerates ten thousand ranks in a moment.

`--device-check` instead uses the device of `backend=`: every operator and two training steps
against references on the host, and bandwidths, as tables to paste into an issue (a minute or two).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.violation import Violation
    from pangu.preflight import Verdict

# Keys whose violations leave intact what the model and its layout are.
ELSEWHERE = {"backend", "data.blend", "data.validation_blend", "data.tokenizer", "data.cache_dir"}
ELSEWHERE |= {"run_dir", "launch.processes", "watch.prometheus_port", "watch.mlflow"}


def main(arguments: Sequence[str]) -> int:
    """2 when there is something to mend, else 0. What the mistakes leave intact is still shown."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if "--device-check" in arguments:
        return check_device([each for each in arguments if each != "--device-check"])
    from configs.check import warnings
    from configs.process_groups import process_groups
    from pangu import plan_tables
    from pangu.violation_table import print_violations, print_warnings

    verdict, absent = examine(list(arguments))
    config, found = verdict.config, verdict.found
    if found:
        print_violations(found)
    broken = {violation.key.split(".")[0] for violation in found}
    members = 0
    if config is not None and broken.isdisjoint({"parallel", "launch", "devices", "hardware"}):
        groups = process_groups(config)
        members = sum(len(kind[0]) > 1 for kind in groups.values())
        plan_tables.show_groups(config, groups)
        chosen = config.memory.recompute_granularity != "auto"
        if chosen and not {violation.key for violation in found} - ELSEWHERE:
            plan_tables.show_parameters(config)
    if config is not None and not found:
        print_warnings([*warnings(config), *absent])
        if verdict.policy:
            print(verdict.policy.table())
    plan_tables.show_machine(config.backend.name if config else "auto")
    plan_tables.show_variables(config.launch.timeout_minutes if config else 10.0, members)
    return 2 if found else 0


def check_device(overrides: list[str]) -> int:
    """2 where the arguments are wrong, 1 where the device is, else 0."""
    from configs import check
    from pangu.violation_table import print_violations

    config, found = check.examine(overrides)
    if found or config is None:
        print_violations(found)
        return 2
    from pangu import device_check  # torch and the engine

    return device_check.main(config.backend.name)


def examine(overrides: list[str]) -> tuple[Verdict, list[Violation]]:
    """The verdict on a configuration, and what only this machine lacks.

    The verdict is that of `pangu.train` on the same arguments; where they plan a cluster, that of
    the processes that a launcher would start there, whose files need not be here.
    """
    from configs import check
    from configs.violation import Violation
    from launch.environment import ProcessEnvironment
    from pangu import preflight

    config, planned_wrong = check.examine(overrides)
    if config is None or not preflight.plans_a_cluster(config):
        here = preflight.examine(ProcessEnvironment(), overrides)
        return here, []
    alone = "python -m pangu.train alone starts one process here"
    if config.launch.processes > 1:
        alone = f"python -m pangu.train alone starts {config.launch.processes} processes here"
    launcher = Violation("devices", config.world_size, alone, "a launcher: see launch/")
    found = [*planned_wrong, *preflight.wrong_machine(config)]
    verdict = preflight.Verdict(config, found) if found else preflight.with_modules(config)
    return verdict, [launcher, *preflight.faults_here(config)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
