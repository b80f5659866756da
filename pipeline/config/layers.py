"""YAML configs as plain mappings: bases and overrides merged, not validated. Works without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from graphkd.errors import ConfigError
from pipeline.core.files import read_text, shown

MAX_YAML_BYTES, MAX_VALUES, MAX_BASES = 1 << 20, 20_000, 64
# Sections that may be given as one word, which sets this key and keeps the base's other keys.
SHORTHAND = {"detector": "framework", "method": "name", "engine": "name"}


def read_layers(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read ``path`` on top of its ``base:`` files, with ``key.sub=value`` overrides on top."""
    content = read_yaml(path)
    for override in overrides:
        content = merge(content, expand_shorthand(parse_override(override)))
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping merged with its bases. ``base`` is a path or a list of them, relative to the file.

    Raises:
        ConfigError: also if a file is its own base, or there are more than ``MAX_BASES``.
    """
    return _read_with_bases(path.resolve(), (), {})


def _read_with_bases(path: Path, below: tuple[Path, ...], read: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    if path in below:
        raise ConfigError(f"{path} is its own base (through {below[-1].name}); remove that base")
    if path in read:  # each file once, however many others it is the base of
        return read[path]
    if len(read) + len(below) >= MAX_BASES:
        raise ConfigError(f"{below[0]} has more than {MAX_BASES} bases; merge some of them")
    content = read_yaml_mapping(path, "config", "configs/")
    bases = content.pop("base", [])
    listed = [bases] if isinstance(bases, str) else bases
    if not isinstance(listed, list) or not all(isinstance(base, str) for base in listed):
        raise ConfigError(f"{path}: base is {str(bases)[:80]!r}, but must be a path or a list of paths")
    base_content: dict[str, Any] = {}
    for base in listed:
        base_content = merge(base_content, _read_with_bases((path.parent / base).resolve(), (*below, path), read))
    read[path] = merge(base_content, expand_shorthand(content))
    return read[path]


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
        content = parse_yaml(read_text(path, MAX_YAML_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"{kind} {shown(path)} does not exist; see {examples} for examples") from error
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{kind} {path} is not readable YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {path} holds a {type(content).__name__}, but must be a mapping of keys to values")
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML safely. Raises ValueError if its aliases multiply it to more than ``MAX_VALUES`` values."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _values(node, {}) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES} values once its aliases are written out")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below a node, with aliases written out."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # of a node that contains itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


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
        content: Any = parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {text!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
    return nest(key, content)


def nest(key: str, content: Any) -> Any:
    """Put ``content`` at a dotted key."""
    for part in reversed(key.split(".")):
        content = {part: content}
    return content
