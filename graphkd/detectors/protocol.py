"""The detector interface, through which the pipeline and the distillation step use every detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from graphkd.batch import Detections, Features, Proposals, RegionPredictions, Targets
from graphkd.detectors.config import Framework

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """Properties of a detector that its students depend on."""

    num_classes: int
    """K, without background."""
    channels: int
    """C, channels of every feature level."""
    pooled_side: int
    """P, side of the pooled grid."""
    activation: Activation
    """How class logits become probabilities."""
    framework: Framework
    """Framework whose names and layout its tensors have."""
    classifies_regions: bool
    """Whether ``classify`` classifies pooled regions (a model with RoI heads) or returns None."""


@runtime_checkable
class Detector(Protocol):
    """Interface of detectors; implementations are a :class:`DetectorModule`.

    A training step runs the backbone once: ``features``, then other methods on its result. Every loss is a tensor
    ``[B]``, one value per page, independent of the other pages of the batch; the training loop sums losses over all
    ranks and divides by the global batch size.
    """

    spec: DetectorSpec

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """Run the backbone on uint8 [B, 3, H, W] RGB canvases; ``sizes`` [B, 2] are the pages' height and width, px."""
        ...

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Return proposals and training losses by name, each [B]."""
        ...

    def propose(self, features: Features) -> Proposals:
        """Return class-agnostic regions, best first, without ground truth."""
        ...

    def pool(self, features: Features, boxes: Tensor) -> Tensor:
        """Pool each page's boxes [B, N, 4] from the features: [B, N, C, P, P]."""
        ...

    def classify(self, pooled: Tensor) -> RegionPredictions | None:
        """Classify pooled regions [..., C, P, P]; None without a region head."""
        ...

    def detect(self, features: Features) -> list[Detections]:
        """Return the final detections of each page."""
        ...


class DetectorModule(nn.Module, Detector):
    """Base class of the adapters.

    Under autocast, networks run in its precision; scores, logits, deltas and losses are float32 nevertheless, because
    half precision cannot represent boxes of a thousand px accurately.
    """

    CLASS_LAYERS: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of parameters that have entries for each class."""

    def compilable_modules(self) -> list[nn.Module]:
        """Parts with static shapes, which are worth compiling. Default: none."""
        return []

    def inheritable_parameters(self) -> dict[str, Tensor]:
        """Parameters by name that can initialise a student with the same widths: heads and pyramid outputs.

        Default: none.
        """
        return {}
