"""A page in one file that opens anywhere: a template, its numbers, and what all pages share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def fill(template: Path, data: dict[str, Any]) -> str:
    """The template with style and script of `page.css` and `page.js`, and with its data."""
    text = template.read_text(encoding="utf-8")
    for mark, file in (("/* shared style */", "page.css"), ("/* shared script */", "page.js")):
        text = text.replace(mark, (FOLDER / file).read_text(encoding="utf-8").rstrip())
    # "<" may not appear inside a script element, not even in a sample of generated HTML.
    return text.replace('"__DATA__"', json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
