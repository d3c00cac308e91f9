"""Measure this machine for the simulator: `python -m pangu.calibrate --out FILE`.

What it writes is a hardware preset: `hardware=FILE` makes the simulator forecast runs on this
machine, and `pangu.train` print its forecast beside what it measures. On several nodes, started by
torchrun on each, `--machine FILE` adds what joins them to the preset of one.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import queue
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.violation import ConfigError, Violation
from launch import environment
from launch.environment import LauncherError

if TYPE_CHECKING:
    from configs.schema import Config
    from pangu.calibration.samples import Device

SILENCE = 300.0  # seconds without a word from the workers before giving up


def calibrate(
    out: Annotated[Path, typer.Option(help="The preset to write, a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="backend=cpu backend.threads=1 backend.precision=…")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that measure at the same time.")
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few shapes, small ones: seconds, and a rough preset.")
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(help="A node's preset: under torchrun on all nodes, add what joins them."),
    ] = None,
) -> None:
    """Measure products, attention, vectors, memory, framework and collectives; write a preset."""
    config = _configuration(overrides or [], out)
    if machine is not None:
        _between_nodes(config, out, machine, quick)
        return
    threads = config.backend.threads or max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    device, tree = _measure(config, out.stem, processes, threads, quick)
    write(out, tree, device, processes)


def _configuration(overrides: list[str], out: Path) -> Config:
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError([Violation("--out", out, "must end with .yaml")])
    if not out.parent.is_dir():
        raise ConfigError([Violation("--out", out, f"there is no folder {out.parent}")])
    for line in overrides:
        if not line.startswith(("backend=", "backend.")):
            raise ConfigError([Violation(line, "", "only backend=… and backend.… matter here")])
    from configs.compose import load
    from pangu.machine_check import backend, impossible

    config = load(["data=synthetic", *overrides])
    if sentences := impossible(config.backend.name):
        raise ConfigError([Violation("backend", config.backend.name, sentences[0])])
    name = backend(config.backend.name)[0]  # a preset is one device's
    return replace(config, backend=replace(config.backend, name=name))  # type: ignore[arg-type]


def _between_nodes(config: Config, out: Path, machine: str, quick: bool) -> None:
    """Under a launcher: every node measures, rank 0 writes."""
    from pangu.calibration import between_nodes
    from pangu.calibration.fit import preset
    from pangu.calibration.messages import SIZES
    from simulator.api import read_hardware

    process = environment.read(os.environ)
    ranks = process.local_world_size
    nodes = process.world_size // ranks
    if nodes < 2:
        way = "torchrun --nnodes=2 --nproc-per-node=N … -m pangu.calibrate --machine … on each"
        raise ConfigError(
            [Violation("--machine", machine, "it takes two nodes to measure what joins them", way)]
        )
    known = read_hardware(machine)
    threads = config.backend.threads or 1
    sizes = between_nodes.QUICK_SIZES if quick else SIZES
    samples = between_nodes.measure(config, process, threads, sizes)
    if samples is None:
        return
    said = f"pangu.calibrate, {datetime.date.today()}, {nodes} nodes of {ranks}"
    found = replace(between_nodes.joined(known, samples, ranks), name=out.stem)
    evidence = known.evidence | {
        "links": f"{known.evidence.get('links', '')}; between nodes: M: {said}"
    }
    _write(out, preset(found, evidence), f"# Measured by {said}\n")


def _measure(
    config: Config, name: str, processes: int, threads: int, quick: bool
) -> tuple[Device, dict[str, Any]]:
    from tqdm import tqdm

    from pangu.calibration import decoding, framework
    from pangu.calibration.fit import fit, preset
    from pangu.calibration.worker import steps

    backend = [f"backend={config.backend.name}", f"backend.precision={config.backend.precision}"]
    backend.append(f"backend.threads={threads}")
    total = framework.runs(processes) + 1 + steps(processes, quick)
    with tqdm(total=total, desc="starting", file=sys.stderr) as bar:

        def say(text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update()

        try:
            cost = framework.measure(backend, processes, quick, say)
            engine = decoding.measure(backend, quick, say)
        except RuntimeError as error:
            raise ConfigError([Violation("backend", config.backend.name, str(error))]) from None
        device = _workers(config, processes, threads, quick, say)
    hardware = fit(name, device, processes, cost, engine)
    return device, preset(hardware, _evidence(device, processes))


def _workers(
    config: Config, processes: int, threads: int, quick: bool, say: Callable[[str], None]
) -> Device:
    """Start the measuring processes and follow them to their end."""
    from pangu.calibration.worker import work

    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        children = [
            context.Process(
                target=work,
                args=(rank, processes, threads, store, config, quick, channel),
                daemon=True,
            )
            for rank in range(processes)
        ]
        for child in children:
            child.start()
        try:
            return _follow(channel, children, config, say)
        finally:
            for child in children:
                child.join(5.0)
                child.kill()


def _follow(
    channel: Any, children: list[Any], config: Config, say: Callable[[str], None]
) -> Device:
    waited = 0.0
    while waited < SILENCE:
        try:
            kind, value = channel.get(timeout=1.0)
        except queue.Empty:
            waited += 1.0
            if failed := [child.exitcode for child in children if child.exitcode]:
                raise _failure(config, f"a process ended with {failed[0]}") from None
            continue
        waited = 0.0
        if kind == "done":
            return value
        if kind == "error":
            raise _failure(config, value)
        say(value)
    raise _failure(config, f"the processes have said nothing for {SILENCE:.0f} s")


def _failure(config: Config, reason: str) -> ConfigError:
    return ConfigError([Violation("backend", config.backend.name, reason)])


def _evidence(device: Device, processes: int) -> dict[str, str]:
    """The grade of every figure."""
    where = f"M: pangu.calibrate, {datetime.date.today()}, {processes} processes at once"
    figures = "vector_tflops memory_bandwidth_gbps memory_efficiency matmul attention launch_us "
    figures += "host_link_gbps"
    result = dict.fromkeys(figures.split(), where)
    vendor = "V: the backend's" if device.peak_tflops else f"{where}: the fastest product"
    result["peak_tflops"] = vendor
    result["vector_tflops"] = "U: a quarter of the matrix peak"
    result["memory_gib"] = "M: of the machine, by process"
    result["links"] = where if processes > 1 else "U: one process has nobody to talk to"
    on_cpu = not device.asynchronous
    result["overlap"] = "D: a CPU process computes and sends with one core" if on_cpu else "U"
    if on_cpu:
        result["process_base_bytes"] = f"{where}: of a model without width"
        result["memory_overhead"] = f"{where}: of a model of two wide layers"
        result["decoding"] = f"{where}: steps of the engine with models without width"
    return result


def write(out: Path, tree: dict[str, Any], device: Device, processes: int) -> None:
    """Write the preset, once the simulator has accepted it."""
    header = (
        f"# Measured by pangu.calibrate on {datetime.datetime.now():%Y-%m-%d %H:%M}\n"
        f"# {device.description}, {platform.platform()}, {device.versions}\n"
        f"# {processes} processes at the same time, {device.threads} threads each\n"
    )
    _write(out, tree, header)


def _write(out: Path, tree: dict[str, Any], header: str) -> None:
    import yaml

    from simulator.api import load_hardware

    load_hardware(tree)
    out.write_text(header + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None))
    print(f"{out}: use it as hardware={out}", file=sys.stderr)


def main() -> None:
    """Run; a mistake of the user's is one sentence and exit code 2."""
    try:
        typer.run(calibrate)
    except (ConfigError, LauncherError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
