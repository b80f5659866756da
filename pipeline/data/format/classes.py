"""Comparing classes by name: of a detector, its teacher, a cache and the datasets that a run uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from graphkd.errors import ConfigError
from pipeline.data.format.schema import DatasetCategory


class ClassEntry(BaseModel):
    """A class as checkpoints and caches record it."""

    model_config = ConfigDict(frozen=True)

    name: str
    text: bool


def unique_names(categories: Sequence[DatasetCategory]) -> list[str]:
    """Names of classes; those that several classes have are followed by the category id."""
    counts = Counter(category.name for category in categories)
    return [
        category.name if counts[category.name] == 1 else f"{category.name} (id {category.id})"
        for category in categories
    ]


def match_classes(
    wanted: Sequence[str], found: Sequence[str], wanted_of: str, found_of: str, *, same_order: bool = False
) -> list[int]:
    """For each wanted class, its index among those found.

    Args:
        wanted: names in the order in which they are used.
        found: names to match with them.
        wanted_of: what has the wanted classes, for messages.
        found_of: what has the others.
        same_order: whether another order is refused, because outputs by class cannot be reordered.

    Raises:
        ConfigError: if names are missing, unknown, or in another order, with both lists.
    """
    faults = [
        *_difference("lacks", wanted, found),
        *_difference("has besides", found, wanted),
    ]
    if not faults and same_order and list(wanted) != list(found):
        faults = ["has them in another order"]
    if faults:
        raise ConfigError(
            f"the classes of {wanted_of} are {', '.join(wanted)}, and those of {found_of} are {', '.join(found)}: the "
            f"latter {' and '.join(faults)}; give both the same classes"
        )
    return [list(found).index(name) for name in wanted]


def _difference(verb: str, left: Sequence[str], right: Sequence[str]) -> list[str]:
    names = [name for name in left if name not in set(right)]
    return [f"{verb} {', '.join(names)}"] if names else []
