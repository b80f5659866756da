"""Resume state of the data: a few integers and the dataset's identity, valid for any number of ranks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import CheckpointError
from pipeline.data.loading.order import ORDER_VERSION

STATE_VERSION = 2
NAMES = {"dataset": "dataset", "seed": "run.seed", "order": "order version", "batch": "schedule.batch"}


class DataState(BaseModel):
    """The complete resume state of the data. Nothing in it depends on ranks or loader workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = STATE_VERSION
    order: int = ORDER_VERSION
    """Version of the canonical order."""
    dataset: str
    """Identity of the dataset: a fingerprint of shards, samples and classes."""
    seed: int
    batch: int = Field(ge=1)
    """Global batch, in samples."""
    position: int = Field(ge=0)
    """Samples of the endless order that were trained on."""

    def check_same_order(self, other: DataState, source: str) -> None:
        """Raise CheckpointError naming what differs if ``other`` follows another order; ``source`` is self's file."""
        changed = [name for name in NAMES if getattr(self, name) != getattr(other, name)]
        if changed:
            details = "; ".join(
                f"{NAMES[name]} {getattr(self, name)!r}, not {getattr(other, name)!r}" for name in changed
            )
            raise CheckpointError(
                f"{source} was trained with {details}, so its position in the order of samples means something else; "
                "restore that, train in another run folder, or start from its weights with run.init"
            )


def load_data_state(content: Any, step: int, source: str) -> DataState:
    """Check a stored state, upgrading version 1; ``step`` is the optimizer step it was stored at.

    Raises:
        CheckpointError: if it is malformed or of a newer version.
    """
    content = dict(content) if isinstance(content, dict) else {}
    version = content.get("version", 1)
    if version == 1:
        content = _upgrade_version_1(content, step)
    elif version != STATE_VERSION:
        raise CheckpointError(f"{source} has data state version {version}, but this release reads {STATE_VERSION}")
    try:
        return DataState.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(
            f"{source} has a data state malformed at {where}; resume from another checkpoint"
        ) from error


def _upgrade_version_1(content: dict[str, Any], step: int) -> dict[str, Any]:
    """Version 1 had no position, since every step took one batch."""
    shared = {name: content.get(name) for name in ("dataset", "seed", "batch")}
    return {"order": content.get("order_version"), **shared, "position": step * int(content.get("batch") or 0)}
