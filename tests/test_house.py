"""Who may import whom: a folder imports only from what stands below it."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. What stands in one line does not know each other.
HOUSE = (
    {"configs", "launch"},
    {"simulator"},
    {"pangu/plain_file"},
    {"pangu/processes", "pangu/run_lock", "pangu/violation_table", "pangu/machine_check"},
    {"pangu/local_launch", "pangu/command_line", "pangu/new_folder"},
    {"pangu/backends"},
    {"pangu/ops"},
    {"pangu/moe"},
    {"pangu/model", "pangu/data", "pangu/schedules", "pangu/offload"},
    {"pangu/engines"},
    {"pangu/checkpoint", "pangu/inference"},
    {"pangu/report", "pangu/weights"},
    {"pangu/training", "pangu/serving", "pangu/calibration"},
    {"pangu/preflight", "pangu/device_check"},
    {"pangu/sweep", "pangu/trained_model", "pangu/plan_tables"},
    {"pangu/task_experts", "pangu/logit_check"},
    {"pangu/compression"},
    {"entry points"},
)
LONGEST_FILE = 400
SCREEN, MOST_POSITIONAL = 60, 7
# The engine's, or torch's, own signatures.
TAKEN_AS_THEY_ARE = {"attention.__init__", "attention.forward"}
LEVEL = {name: level for level, names in enumerate(HOUSE) for name in names}


def rglob(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))


def place(file: Path) -> str:
    """Where a file stands in HOUSE; a module that can be run is an entry point."""
    if file.parts[0] != "pangu":
        return file.parts[0]
    if file.parent == Path("pangu") and '__name__ == "__main__"' in (ROOT / file).read_text():
        return "entry points"
    return f"pangu/{file.parts[1].removesuffix('.py')}"


def imported(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def file_of(module: str) -> Path | None:
    """The file of a module or package of ours; None for others, and for names in a module."""
    path = Path(module.replace(".", "/"))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if (ROOT / file).is_file()), None)


def breaches(file: Path) -> set[tuple[str, str]]:
    """(importer, imported) of each import that goes up, or past the simulator's door."""
    here, found = place(file), set()
    for module in imported(file) - {"pangu"}:
        if here in ("configs", "simulator") and module in ("torch", "megatron"):
            found.add((here, module))
        target = file_of(module)
        if target is None or (there := place(target)) == here != "entry points":
            continue
        if LEVEL[there] >= LEVEL[here]:
            found.add((here, there))
        if there == "simulator" and module not in ("simulator", "simulator.api"):
            found.add(("pangu", "behind the simulator's door"))
    return found


def test_imports_go_one_way():
    tops = ("configs", "simulator", "pangu", "launch")
    files = [file.relative_to(ROOT) for top in tops for file in rglob(top)]
    found = set().union(*(breaches(file) for file in files if file != Path("pangu/__init__.py")))
    assert not found


def test_functions_fit_a_screen_and_long_lists_of_arguments_are_keywords():
    long, many = {}, {}
    for file in (f for top in ("configs", "simulator", "pangu", "launch") for f in rglob(top)):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            name, lines = f"{file.stem}.{node.name}", node.end_lineno - node.lineno + 1
            if lines > SCREEN:
                long[name] = lines
            positional = [*node.args.posonlyargs, *node.args.args]
            options = "Annotated" in ast.unparse(node.args)  # of a command line
            kernel = any(ast.unparse(each) == "triton.jit" for each in node.decorator_list)
            if len(positional) > MOST_POSITIONAL and not options and not kernel:
                many[name] = len(positional)
    assert long == {}
    assert many.keys() - TAKEN_AS_THEY_ARE == set()


def test_files_hold_one_concept():
    files = (file for top in ("configs", "simulator", "pangu", "launch") for file in rglob(top))
    assert [f.name for f in files if len(f.read_text().splitlines()) > LONGEST_FILE] == []


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone: of two that are called alike it refuses one."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
