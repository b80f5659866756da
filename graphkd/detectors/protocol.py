"""The detector interface: everything the pipeline and the distillation step know of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from graphkd.batch import Detections, Features, Proposals, RegionPredictions, Targets
from graphkd.detectors.config import Framework

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """What a detector is, as far as another one distilled from it has to know."""

    num_classes: int
    """K, without background."""
    channels: int
    """C, channels of every feature level."""
    pooled_side: int
    """P, side of the pooled grid."""
    activation: Activation
    """How class logits become probabilities."""
    framework: Framework
    """In whose names and layout its tensors are."""
    classifies_regions: bool
    """Whether ``classify`` answers for any pooled region (a model with RoI heads) or gives None."""


@runtime_checkable
class Detector(Protocol):
    """A detector as the distillation step sees it; implementations are ``torch.nn.Module``.

    A training step runs the backbone once: ``features``, then any of the others on its result. Every loss is a
    tensor ``[B]``, one value a page, that does not depend on the other pages of the batch; the training loop sums
    them over all ranks and divides by the global batch size.
    """

    spec: DetectorSpec

    def features(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Features:
        """Run the backbone on uint8 [B, 3, H, W] RGB canvases; pages are ``image_sizes`` (height, width) px."""
        ...

    def propose_and_losses(self, features: Features, targets: Targets) -> tuple[Proposals, dict[str, Tensor]]:
        """Give the detector's own proposals and its training losses by name, each [B]."""
        ...

    def propose(self, features: Features) -> Proposals:
        """Give class-agnostic regions, best first, without ground truth."""
        ...

    def pool(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """Pool each page's boxes [N_i, 4] from the features: [sum N_i, C, P, P]."""
        ...

    def classify(self, pooled: Tensor) -> RegionPredictions | None:
        """Classify pooled regions [N, C, P, P], or None where the model has no region head."""
        ...

    def detect(self, features: Features) -> list[Detections]:
        """Give the final detections of each page."""
        ...


class DetectorModule(nn.Module, Detector):
    """A detector as a torch module: what adapters derive from, and what is trained, saved and sent to a device.

    Under autocast the networks run in its precision; scores, logits, deltas and losses are float32 all the same, since
    boxes of a thousand px need more digits than half precision has.
    """

    def compilable_modules(self) -> list[nn.Module]:
        """Parts whose tensors have one shape for one number of pages, so that compiling them pays. By default none."""
        return []

    def inheritable_parameters(self) -> dict[str, Tensor]:
        """Parameters by name that a student of the same architecture and widths can start from: all that reads the
        pyramid, and the pyramid's outputs. By default none.
        """
        return {}
