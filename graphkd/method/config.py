"""Config of the distillation method."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from graphkd.method import DsigWeights, GraphConfig, LossWeights, PkdWeights

Method = Literal["none", "dsig", "pkd", "graphkd"]


class MethodConfig(BaseModel):
    """Distillation method and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Method = "none"
    """none trains the detector alone; dsig, pkd and graphkd distil."""
    nodes: Literal["fixed", "student"] = "fixed"
    """fixed: chosen from the teacher's proposals, as a cache needs; student: from the student's proposals of the step,
    as published for Dsig, which needs a live teacher."""
    inherit: bool | None = None
    """Whether the student's heads and pyramid outputs are initialised from the teacher's; default: for graphkd, if all
    shapes match."""
    graph: GraphConfig = GraphConfig()
    """Graph of graphkd."""
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
        """Whether the student's heads are initialised from the teacher's."""
        return self.inherit if self.inherit is not None else self.name == "graphkd"

    @property
    def uses_maps(self) -> bool:
        """Whether the method uses the teacher's feature pyramid, which only a live teacher has."""
        return self.name == "pkd" or self.maps_weight > 0

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the method needs a live teacher: it uses the student's nodes, or a loss on feature maps.

        Dsig without its map term is still Dsig, so with a cache that term is omitted.
        """
        chosen = self.name != "none" and self.nodes == "student"
        return self.name == "pkd" or chosen or (self.name == "graphkd" and self.weights.maps > 0)

    @property
    def maps_weight(self) -> float:
        """Weight of the feature pyramid's squared error in dsig and graphkd."""
        return {"dsig": self.dsig.maps, "graphkd": self.weights.maps}.get(self.name, 0.0)
