"""Loading YAML configs with ``base:`` and overrides; every mistake is listed at once with a close name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from graphkd.errors import ConfigError
from pipeline.config.schema import RunConfig


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path``, what its ``base:`` names, and ``key.sub=value`` overrides, in that order of precedence.

    Raises ConfigError with every mistake, one per line.
    """
    content = read_yaml(path)
    for override in overrides:
        content = _merged(content, _parse_override(override))
    return resolve(content, str(path))


def resolve(content: Mapping[str, Any], source: str) -> RunConfig:
    """Check a plain mapping; ``source`` names it in the error."""
    try:
        return RunConfig.model_validate(dict(content))
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}", *lines])) from error


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with its bases merged in; ``base`` is one path or a list, relative to the file that names it."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path} is its own base (through {seen[-1].name}); take that base out")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config {path} does not exist; see configs/ for those that do") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} holds a {type(content).__name__}, but a run is a mapping of keys to values")
    bases = content.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merged(merged, read_yaml(path.parent / base, (*seen, path)))
    return _merged(merged, content)


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(low)
    for key, value in high.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if nested else value
    return result


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key.sub=value, such as schedule.lr=0.02")
    try:
        content: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
    for part in reversed(key.split(".")):
        content = {part: content}
    return content


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
