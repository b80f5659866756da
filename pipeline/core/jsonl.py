"""Reading files of JSON lines that a kill may have cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Whole JSON objects of a file, one a line; what is cut off is left out, and a file that is not there is empty."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
