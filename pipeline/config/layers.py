"""YAML configs as plain mappings: bases and overrides merged, not validated. Works without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from graphkd.errors import ConfigError

# Sections that may be given as one word, which sets this key and keeps the base's other keys.
SHORTHAND = {"detector": "framework", "method": "name", "engine": "name"}


def read_layers(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read ``path`` on top of its ``base:`` files, with ``key.sub=value`` overrides on top."""
    content = read_yaml(path)
    for override in overrides:
        content = merge(content, expand_shorthand(parse_override(override)))
    return content


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping merged with its bases. ``base`` is a path or a list of them, relative to the file."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path} is its own base (through {seen[-1].name}); remove that base")
    content = read_yaml_mapping(path, "config", "configs/")
    bases = content.pop("base", [])
    base_content: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_content = merge(base_content, read_yaml(path.parent / base, (*seen, path)))
    return merge(base_content, expand_shorthand(content))


def expand_shorthand(content: dict[str, Any]) -> dict[str, Any]:
    """Expand ``detector: detectron2`` to ``detector: {framework: detectron2}``, and the other sections likewise."""
    words = {key: {name: content[key]} for key, name in SHORTHAND.items() if isinstance(content.get(key), str)}
    return {**content, **words}


def read_yaml_mapping(path: Path, kind: str, examples: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: if it does not; names the ``kind`` of file and a folder of ``examples``.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{kind} {path} does not exist; see {examples} for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{kind} {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {path} holds a {type(content).__name__}, but must be a mapping of keys to values")
    return content


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings recursively; values of ``high`` take precedence."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """Parse ``key.sub=value`` into a nested mapping. Raises ConfigError if it has another form."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key.sub=value, such as schedule.lr=0.02")
    try:
        content: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
    return nest(key, content)


def nest(key: str, content: Any) -> Any:
    """Put ``content`` at a dotted key."""
    for part in reversed(key.split(".")):
        content = {part: content}
    return content
