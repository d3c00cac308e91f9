"""A page in one file that opens anywhere: a template, its numbers, and what all pages share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SHARED = {
    "/* shared style */": "page.css",
    "/* shared script */": "page.js",
    "/* shared chart style */": "charts.css",
    "/* shared charts */": "charts.js",
}


def fill(template: Path, data: dict[str, Any]) -> str:
    """The template with the styles and scripts that it marks (`SHARED`), and with its data."""
    text = template.read_text(encoding="utf-8")
    for mark, file in SHARED.items():
        if mark in text:
            text = text.replace(mark, (FOLDER / file).read_text(encoding="utf-8").rstrip())
    # "<" may not appear inside a script element, not even in a sample of generated HTML.
    return text.replace('"__DATA__"', json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
