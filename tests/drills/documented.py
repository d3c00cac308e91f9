"""Every command of the documentation, run: `python -m tests.drills.documented [PAGE]…`.

Page after page, in a page's order, in a folder of its own below `--folder` (a temporary one), with
what a reader would have: texts, corpora, models. `SHORTER` has what makes a command short, `CANNOT`
which ones do not run here and why. A line for each: seconds, exit code, command; then what was not
run. Exit code 1 when a command failed. A quarter of an hour of one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_documented import ROOT, documented

# A part of a command, a regular expression, and why none with it is run here.
CANNOT = {
    r"^docker (build|stop|compose|run$)|^docker$": "no Docker here; tests/test_containers.py reads "
    "the files, and docs/containers.md tells of the CPU image built and run by buildah",
    r"^kubectl": "no Kubernetes here; tests/launch validates the manifests",
    r"^sbatch": "no Slurm here; docs/launching.md tells of the runs on a local one",
    r"^pip install": "tests/test_wheel.py builds and installs the wheel",
    r"^make (install|check|test)\b(?!-)": "it is what runs this: .ci/run",
    r"^make train": "python -m pangu.train experiment=quickstart, in .venv",
    r"test-gpu": "it is python -m pangu.doctor backend=cuda --device-check, in .venv",
    r"benchmarks(?!/gpu)": "a benchmark, minutes to hours of idle cores: benchmarks/README.md",
    r"tests\.drills": "a drill of its own; tests run its parts",
    r"endpoint=HOST": "nodes of one's own; tests/cluster/test_link_calibration.py runs it on two",
    r"METHOD MODEL|backend=… ": "words are left to the reader",
    r"^torchrun --local-addr 127.0.0.1 --nproc-per-node 2$": "the beginning of a command",
    r"^python -m (simulator predict|pangu\.calibrate)$": "a command's name in prose",
}
TRAIN = "train.steps=2 train.global_batch_size=4 train.micro_batch_size=1 train.seq_length=64 "
TRAIN += "train.validate_every=0 checkpoint.save_every=2 optimizer.warmup_steps=1"
CORPUS = "data=indexed 'data.blend={corpora/mine: 1.0}'"
MOE = f"experiment=quickstart moe=top_k {CORPUS}"
DENSE = f"{CORPUS} model=moge_tiny model.num_experts=0 model.num_layers=7 model.ffn_hidden_size=256"
# A part of a command, a regular expression, and words that make it short: each takes the place of
# the same key or option where the command has it.
SHORTER = {
    r"pangu\.train": TRAIN,
    r"pangu\.train (-m )?(moe|launch|data)": "experiment=quickstart",
    r"pangu\.train .*quickstart|pangu\.train (-m )?(moe|launch)": CORPUS,
    r"launch\.processes=8": "launch.processes=2",
    r"nvme_path": "engine.nvme_path=drive",
    r"run_dir=runs/(heads|joint)": MOE,
    r"run_dir=runs/heads": "train.steps=4",  # each goes on from the one before
    r"run_dir=runs/joint": "train.steps=6",
    r"pangu\.(compress (prune|carve|quantize)|evaluate)": "--tokens 512 --window 64",
    r"pangu\.generate": "max_new_tokens=4",
    r"output=answers": "output=kept.jsonl",
    r"--train-tokenizer": "--train-tokenizer 1000",
    r"pangu\.calibrate --out": "--quick",
    r"simulator shape": "--shortlist 2",
    r"pangu\.serve": "port=0",
    r"simulator serve": "--port 0",
    r"doctor experiment=quickstart$": "run_dir=runs/new",
    r"compiled_kernels": "short",
}
# Where it ends with 2 and a sentence, for want of a device, or of the rights to make a network.
MAY_END_WITH_2 = r"backend=(npu|cuda)|benchmarks/gpu|tests\.cluster"
# A part of a command, a word in it that stands for the reader's, and which of the reader's.
MEANT = (
    (r"prune-experts|patterns=", "MODEL", "MOE"),
    (r"pangu\.serve .*parallel\.expert", "DIR", "MOE"),
    (r"--task sciq", "--task sciq ", ""),  # it wants a package of tasks
    (r"--results FILE", "--results FILE", "--results kept"),
    (r"-- COMMAND$", "COMMAND", "hostname"),
    (r"benchmarks/gpu", "benchmarks", str(ROOT / "benchmarks")),
    (r"^docker run", "train …", "train experiment=quickstart"),
    (r"--tokenizer CORPUS", "CORPUS", "corpora/mine"),
    (r"CARVED", "CARVED", "DIR"),  # the command before has made it
    (r"pangu\.train …", "…", ""),
    (
        r"simulator predict …",
        "…",
        "experiment=quickstart hardware=h100",
    ),
    (r"train\.steps=…", "train.steps=…", ""),
    (r'prompt="…"', "…", "def main("),
)
SERVES = re.compile(r"pangu\.serve|simulator serve")


@dataclass(frozen=True)
class Outcome:
    page: str
    line: str
    seconds: float
    code: int
    said: str


def reason(line: str) -> str:
    """Why a command is not run; "" where it is."""
    return next((why for part, why in CANNOT.items() if re.search(part, line)), "")


def inside(line: str) -> str:
    """A command of a container in the words of one without."""
    return re.sub(r"^docker run .*?pangu:\w+ (?!torchrun)", "python -m pangu.", line)


def shortened(line: str) -> list[str]:
    """The words of a command, as it is run here."""
    for part, stands, means in MEANT:
        if re.search(part, line):
            line = line.replace(stands, means)
    words = shlex.split(line, comments=True)
    if line.startswith("docker run"):  # what the container does
        image = next(at for at, word in enumerate(words) if word.startswith("pangu:"))
        words = [str(ROOT / "docker/entrypoint.sh"), *words[image + 1 :]]
    for part, extra in SHORTER.items():
        if re.search(part, inside(line)):
            words = _replaced(words, shlex.split(extra))
    return words


def _replaced(words: list[str], extra: list[str]) -> list[str]:
    """`words` with those of `extra` in the places of the same keys and options, or at the end."""
    words, at = list(words), 0
    while at < len(extra):
        new = extra[at : at + 2] if extra[at].startswith("--") else [extra[at]]
        if extra[at] == "--quick":
            new = ["--quick"]
        at += len(new)
        key = new[0].partition("=")[0]
        same = [i for i, word in enumerate(words) if word.partition("=")[0] == key]
        if same and len(new) == 2:
            words[same[0] : same[0] + 2] = new
        elif same:
            words[same[0]] = new[0]
        else:
            words += new
    return words


def texts(folder: Path) -> None:
    """What a reader has before a page: texts in every form, and a corpus.

    Raises:
        subprocess.CalledProcessError: it could not be made.
    """
    sources = sorted((ROOT / "simulator").glob("*.py"))
    written = [source.read_text() for source in sources]
    for number, text in enumerate(written):
        for place in ("texts", "code"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / "texts" / f"{number}.txt").write_text(text)
        (folder / "code" / f"{number}.py").write_text(text)
    for number, name in enumerate(("text", "code", "prose", "other", "judge", "some")):
        (folder / f"{name}.txt").write_text("\n".join(written[number : number + 4]))
    shutil.copy(folder / "text.txt", folder / "FILE")
    with gzip.open(folder / "more.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in written[:4])
    _parquet(folder / "web.parquet", written[4:8])
    with (folder / "questions.jsonl").open("w") as out:
        for number, answer in ((0, " text"), (0, " nothing"), (1, " a"), (1, " b")):
            request = {"context": written[number][:60], "continuation": answer}
            out.write(json.dumps({"doc_id": number, "request": request, "label": 1}) + "\n")
    with (folder / "prompts.jsonl").open("w") as out:
        out.writelines(json.dumps({"prompt": text[:60]}) + "\n" for text in written[:2])
    with (folder / "answers.jsonl").open("w") as out:
        out.writelines(json.dumps({"document": text}) + "\n" for text in written)
    prepare = "pangu.data.prepare texts --output corpora/mine --train-tokenizer 1000"
    _do(folder, prepare)
    (folder / "corpus").symlink_to("corpora/mine")
    (folder / "other").mkdir()
    shutil.copy(folder / "corpora/mine/tokenizer.json", folder / "other/tokenizer.json")
    for end in ("bin", "idx"):
        shutil.copy(folder / f"corpora/mine/train.{end}", folder / f"other/prefix.{end}")


def models(folder: Path) -> None:
    """And a model: trained, a Hugging Face one, imported, dense and of experts; steps for a chain.

    Raises:
        subprocess.CalledProcessError: they could not be made.
    """
    _do(folder, f"pangu.train {MOE} {TRAIN} run_dir=runs/quickstart")
    _do(folder, f"pangu.train {DENSE} {TRAIN} run_dir=runs/dense")
    _do(folder, "pangu.convert export runs/dense --out PATH")
    _do(folder, "pangu.convert import PATH --out MODEL")
    (folder / "models").mkdir()
    links = {"MOE": "runs/quickstart", "DIR": "MODEL", "RUN_DIR": "runs/quickstart"}
    links |= {"runs/model": "quickstart", "models/moe": "../runs/quickstart"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    page = (ROOT / "docs/compression.md").read_text()
    steps = re.search(r"chain steps.yaml\n\n((?: {4}.*\n)+)", page)
    assert steps
    short = re.sub(r".*tasks:.*\n|^ {4}", "", steps[1], flags=re.MULTILINE)
    short = short.replace("16384", "512").replace("4096", "512").replace("1024", "64")
    (folder / "steps.yaml").write_text(short.replace("models/mine", "MODEL"))


def _parquet(file: Path, written: list[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": written}), file)


def _do(folder: Path, words: str) -> None:
    command = [sys.executable, "-m", *shlex.split(words)]
    subprocess.run(command, cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def run(page: str, line: str, folder: Path, limit: float = 900.0) -> Outcome:
    """A command in its page's folder. What it writes anew takes the place of what is there."""
    words = shortened(line)
    if "pangu.train" in inside(line) and "run_dir=" not in line:
        words.append(f"run_dir=runs/{len(list((folder / 'runs').iterdir()))}")
    for out in ("--out", "--output", "--store"):
        there = folder / words[words.index(out) + 1] if out in words else folder / "nothing"
        if there.is_symlink() or there.is_file():
            there.unlink()
        elif there.is_dir():
            shutil.rmtree(there)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if SERVES.search(inside(line)):
                code = _served(process, said.fileno(), launched=line.startswith("torchrun"))
            else:
                code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        text = said.read()
    if code == 2 and re.search(MAY_END_WITH_2, line) and "Traceback" not in text:
        code = 0
    return Outcome(page, line, time.monotonic() - began, code, text)


def _served(process: subprocess.Popen[bytes], said: int, launched: bool) -> int:
    """The exit code of a server that is told to stop once it has said where it is; `launched` by
    torchrun, which then ends with 1 whatever its processes do."""
    for _ in range(3000):
        if process.poll() is not None:
            return process.returncode or 1
        if b"http://" in os.pread(said, 1 << 20, 0):
            process.send_signal(signal.SIGINT)
            ended = process.wait(120)
            return 0 if launched and ended == 1 else ended
        time.sleep(0.1)
    return 124


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.drills.documented", description=__doc__)
    parser.add_argument("pages", nargs="*", help="README.md, docs/data.md, …; all without any")
    parser.add_argument("--folder", type=Path, help="kept, and taken up where it has the models")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    with tempfile.TemporaryDirectory() as made:
        return _pages(options.pages, options.folder or Path(made))


def _pages(pages: list[str], folder: Path) -> int:
    if not (folder / "reader/steps.yaml").exists():
        texts(folder / "reader")
        models(folder / "reader")
    outcomes, left = [], []
    for page, line in documented():
        if pages and page not in pages:
            continue
        if why := reason(line):
            left.append((page, line, why))
            continue
        here = folder / page.replace("/", "_")
        if not here.exists():
            shutil.copytree(folder / "reader", here, symlinks=True)
        outcome = run(page, line, here)
        outcomes.append(outcome)
        print(f"{outcome.seconds:6.1f} s  {outcome.code:4}  {page}: {line}", flush=True)
        if outcome.code:
            print("\n".join(f"    {each}" for each in outcome.said.splitlines()[-15:]), flush=True)
    for page, line, why in left:
        print(f"not run  {page}: {line}\n    {why}")
    failed = sum(outcome.code != 0 for outcome in outcomes)
    print(f"{len(outcomes)} commands run, {failed} failed, {len(left)} not run")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
