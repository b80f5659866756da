"""Safe reader of detectron2's YAML: resolves ``_BASE_``, parses Python literals, rejects tags that execute code.

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
ANCHOR_SIZES_EXPRESSION = re.compile(
    r"\[\s*\[\s*x\s*,\s*x\s*\*\s*2\s*\*\*\s*\(1\.0/3\)\s*,\s*x\s*\*\s*2\s*\*\*\s*\(2\.0/3\)\s*\]"
    r"\s*for x in\s*\[([\d\s,]+)\]\s*\]"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that accepts only the anchor-size expression among ``!!python`` tags."""


def _construct_anchor_sizes(loader: yaml.SafeLoader, node: yaml.Node) -> list[list[float]]:
    items = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    match = ANCHOR_SIZES_EXPRESSION.fullmatch(str(items[0]).strip()) if len(items) == 1 else None
    if match is None:
        raise _unsafe_tag("eval", node)
    return [[size * 2 ** (scale / 3) for scale in range(3)] for size in map(int, match[1].split(","))]


def _reject_python_tag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    raise _unsafe_tag(suffix, node)


def _unsafe_tag(tag: str, node: yaml.Node) -> ConfigError:
    return ConfigError(
        f"{node.start_mark.name.strip()}, line {node.start_mark.line + 1}: !!python tag {tag!r} would execute code; "
        "replace it by its value, such as SIZES: [[32, 40.3, 50.8], [64, 80.6, 101.6]]"
    )


_Loader.add_constructor(EVAL_TAG, _construct_anchor_sizes)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _reject_python_tag)


def read_detectron2_yaml(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file on top of its ``_BASE_``; ``including`` are the files that led to it.

    Raises:
        ConfigError: if it cannot be read safely.
    """
    path = path.resolve()
    if path in including:
        raise ConfigError(f"{path} is its own _BASE_ (through {including[-1].name}); remove that _BASE_")
    content = _read(path)
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    if "://" in str(base):
        raise ConfigError(f"{path}: _BASE_ {base} is not a file; download it and give its path")
    return merge(read_detectron2_yaml(path.parent / str(base), (*including, path)), content)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf8") as file:
            content = yaml.load(file, Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give a detectron2 YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} contains a {type(content).__name__}, but must be a mapping")
    return _parse_literals(content)


def _parse_literals(value: Any) -> Any:
    """Parse tuples and lists that YAML reads as text, as yacs does: ``("name",)`` is a tuple."""
    if isinstance(value, dict):
        return {key: _parse_literals(inner) for key, inner in value.items()}
    if isinstance(value, str) and value[:1] in "([":
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
