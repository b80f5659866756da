"""Reading detectron2's YAML files safely: ``_BASE_``, Python literals in strings, and no tag that runs code.

Needs neither detectron2 nor torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from graphkd.errors import ConfigError
from pipeline.config.layers import merge

EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
# The one expression that detectron2's RetinaNet configs use: three scales per octave of each size.
OCTAVES = re.compile(
    r"\[\s*\[\s*x\s*,\s*x\s*\*\s*2\s*\*\*\s*\(1\.0/3\)\s*,\s*x\s*\*\s*2\s*\*\*\s*\(2\.0/3\)\s*\]"
    r"\s*for x in\s*\[([\d\s,]+)\]\s*\]"
)


class _Loader(yaml.SafeLoader):
    """Safe loader that recognises that expression by its text."""


def _construct_octaves(loader: yaml.SafeLoader, node: yaml.Node) -> list[list[float]]:
    items = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    known = OCTAVES.fullmatch(str(items[0]).strip()) if len(items) == 1 else None
    if known is None:
        raise ConfigError(f"{node.start_mark.name.strip()}, line {node.start_mark.line + 1}: {_refusal('eval')}")
    return [[size * 2 ** (scale / 3) for scale in range(3)] for size in map(int, known[1].split(","))]


def _refuse(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    raise ConfigError(f"{node.start_mark.name.strip()}, line {node.start_mark.line + 1}: {_refusal(suffix)}")


def _refusal(tag: str) -> str:
    return (
        f"!!python tag {tag!r} would run code, so it is refused; write its value out, such as "
        "SIZES: [[32, 40.3, 50.8], [64, 80.6, 101.6]]"
    )


_Loader.add_constructor(EVAL_TAG, _construct_octaves)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _refuse)


def read_detectron2(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file on top of its ``_BASE_``. Raises ConfigError if it cannot be read safely."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path} is its own _BASE_ (through {seen[-1].name}); remove that _BASE_")
    content = _read(path)
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    if "://" in str(base):
        raise ConfigError(f"{path}: _BASE_ {base} is not a file; download it and give its path")
    return merge(read_detectron2(path.parent / str(base), (*seen, path)), content)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf8") as file:
            content = yaml.load(file, Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give a YAML file of detectron2") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, but must be a mapping of keys to values")
    return _literal(content)


def _literal(value: Any) -> Any:
    """Parse tuples and lists that YAML reads as text, as yacs does: ``("name",)`` is a tuple."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, str) and value[:1] in "([":
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def leaves(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
