"""JSON Lines files that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.files import output_errors


def append_jsonl(path: Path, entry: dict[str, Any]) -> None:
    """Append ``entry`` as one line, also after a line that a kill cut off.

    Raises:
        OutputError: if the disk is full or the file cannot be written.
    """
    text = json.dumps(entry)
    with output_errors(path), path.open("ab+") as file:
        if file.tell() and not _ends_in_newline(file):
            text = "\n" + text
        file.write(text.encode() + b"\n")


def _ends_in_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file, without lines that are cut off; empty if the file does not exist."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
