"""Compare the golden runs of two commits on this machine to the last digit: ``python -m tests.golden.compare A B``.

``A`` and ``B`` are what git names commits by; ``.`` is the working tree. Exit code 1 where a loss or a weight differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.golden import runs

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run both, print the cases that differ."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tests.golden.compare COMMIT COMMIT")
    first, second = (golden_runs(name) for name in sys.argv[1:])
    cases = {**first["losses"], "resumed": first["resumed"]}, {**second["losses"], "resumed": second["resumed"]}
    differing = [name for name in cases[0] if cases[0][name] != cases[1].get(name)]
    sys.stdout.write(f"{len(cases[0]) - len(differing)} of {len(cases[0])} cases are equal to the last digit\n")
    sys.exit(f"these differ: {', '.join(differing)}" if differing else 0)


def golden_runs(commit: str) -> dict[str, Any]:
    """The golden runs of a commit's code, in a process of its own."""
    with checkout(commit) as folder, tempfile.TemporaryDirectory() as out:
        result = Path(out) / "result.json"
        command = [sys.executable, str(Path(runs.__file__)), str(result)]
        subprocess.run(command, check=True, cwd=out, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=2)
        content: dict[str, Any] = json.loads(result.read_text())
        return content


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the files of ``commit``."""
    if commit == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="graphkd-commit-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        yield Path(folder)


if __name__ == "__main__":
    main()
