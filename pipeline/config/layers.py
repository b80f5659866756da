"""YAML configs as plain mappings: ``base:`` and overrides put together, unchecked. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from graphkd.errors import ConfigError

# A section given as one word says what it is, and keeps what its bases say of the rest.
SHORTHAND = {"detector": "framework", "method": "name", "engine": "name"}


def read_layers(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What ``path`` says, on top of what its ``base:`` names, and below ``key.sub=value`` overrides."""
    content = read_yaml(path)
    for override in overrides:
        content = merge(content, expand_shorthand(parse_override(override)))
    return content


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with its bases merged in; ``base`` is one path or a list, relative to the file that names it."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path} is its own base (through {seen[-1].name}); take that base out")
    content = read_yaml_mapping(path, "config", "configs/")
    bases = content.pop("base", [])
    content_of_bases: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        content_of_bases = merge(content_of_bases, read_yaml(path.parent / base, (*seen, path)))
    return merge(content_of_bases, expand_shorthand(content))


def expand_shorthand(content: dict[str, Any]) -> dict[str, Any]:
    """``detector: detectron2`` as ``detector: {framework: detectron2}``, and so the other sections of ONE_WORD."""
    words = {key: {name: content[key]} for key, name in SHORTHAND.items() if isinstance(content.get(key), str)}
    return {**content, **words}


def read_yaml_mapping(path: Path, kind: str, examples: str) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises ConfigError, naming its ``kind`` and a folder of ``examples``."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{kind} {path} does not exist; see {examples} for those that do") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{kind} {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {path} holds a {type(content).__name__}, but it is a mapping of keys to values")
    return content


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings put together, key by key; ``high`` counts where both say something."""
    result = dict(low)
    for key, value in high.items():
        nest = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if nest else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``key.sub=value`` as a mapping; raises ConfigError where it is no such thing."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key.sub=value, such as schedule.lr=0.02")
    try:
        content: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
    return nest(key, content)


def nest(key: str, content: Any) -> Any:
    """``content`` at a key with dots."""
    for part in reversed(key.split(".")):
        content = {part: content}
    return content
