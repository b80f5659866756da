"""Which method a student learns by, and its switches."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from graphkd.method import DsigWeights, GraphConfig, LossWeights, PkdWeights

Method = Literal["none", "dsig", "pkd", "graphkd"]


class MethodConfig(BaseModel):
    """The method and its switches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Method = "none"
    """none trains the detector alone; dsig, pkd and graphkd distil."""
    nodes: Literal["fixed", "student"] = "fixed"
    """fixed: boxes chosen with the teacher, so that a cache works; student: among the student's proposals of the
    step, as Dsig was published, which needs a live teacher."""
    inherit: bool | None = None
    """Whether the student starts from the teacher's heads and pyramid outputs; by default graphkd does where every
    part has the same shape in both, and no other method does."""
    graph: GraphConfig = GraphConfig()
    """How graphkd's graph is built."""
    weights: LossWeights = LossWeights()
    """Loss weights of graphkd."""
    dsig: DsigWeights = DsigWeights()
    """Loss weights of dsig."""
    pkd: PkdWeights = PkdWeights()
    """Loss weight of pkd."""

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.name == "pkd" and self.nodes == "student":
            raise ValueError("method.name pkd compares whole maps and has no nodes; leave method.nodes out")
        if self.name == "none" and self.inherit:
            raise ValueError("method.inherit is true, but method.name none has no teacher; leave method.inherit out")
        return self

    @property
    def inherits(self) -> bool:
        """Whether the student is to start from the teacher's heads."""
        return self.inherit if self.inherit is not None else self.name == "graphkd"

    @property
    def uses_maps(self) -> bool:
        """Whether the teacher's whole pyramid is wanted; only a live teacher has it."""
        return self.name == "pkd" or self.maps_weight > 0

    @property
    def needs_live_teacher(self) -> bool:
        """Whether no cache can serve: nodes of the student's choice, or a loss on maps.

        Dsig without its map term is still Dsig, so with a cache that one term is left out.
        """
        chosen = self.name != "none" and self.nodes == "student"
        return self.name == "pkd" or chosen or (self.name == "graphkd" and self.weights.maps > 0)

    @property
    def maps_weight(self) -> float:
        """Weight of the whole pyramid's squared error in dsig and graphkd."""
        return {"dsig": self.dsig.maps, "graphkd": self.weights.maps}.get(self.name, 0.0)
