"""Name and folder of a run, from its config before it is resolved: a login node need not load torch for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graphkd.errors import ConfigError
from pipeline.core.run_paths import RunName

_NAME: TypeAdapter[str] = TypeAdapter(RunName)


def run_name(content: dict[str, Any], config: Path) -> str:
    """Return the run's name. Raises ConfigError if ``config`` has none, or one that is no file name."""
    name = content.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"{config} has no name; add one, such as name: my-run")
    try:
        return _NAME.validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"{config} has the name {name!r}; use letters, digits, dots, dashes and underscores, such as my-run"
        ) from error


def run_folder(content: dict[str, Any]) -> Path:
    """Return the run's folder, relative as in its config."""
    return Path((content.get("run") or {}).get("folder") or Path("runs") / str(content.get("name")))
