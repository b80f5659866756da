"""Loading and validating YAML configs. Every mistake is listed at once, with the closest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from graphkd.errors import ConfigError
from pipeline.config.layers import read_layers
from pipeline.config.schema import RunConfig


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load ``path`` on top of its ``base:`` files, with ``key.sub=value`` overrides on top.

    Raises:
        ConfigError: with every mistake, one per line.
    """
    return resolve(read_layers(path, overrides), str(path))


def resolve(content: Mapping[str, Any], source: str) -> RunConfig:
    """Validate a plain mapping; ``source`` names it in errors."""
    try:
        return RunConfig.model_validate(dict(content))
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}", *lines])) from error


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location) or "config"
    if problem["type"] == "extra_forbidden":
        return f"  {dotted}: unknown key{_suggestion(location)}"
    if problem["type"] == "missing":
        return f"  {dotted}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    return f"  {dotted}: {message[0].lower()}{message[1:]}{given}"


def _suggestion(location: list[str]) -> str:
    names = _field_names(location[:-1])
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(names)}" if names else ""


def _field_names(location: list[str]) -> list[str]:
    model: type[BaseModel] | None = RunConfig
    for part in location:
        field = model.model_fields.get(part) if model is not None else None
        model = None if field is None else _model_of(field.annotation)
    return [] if model is None else list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
