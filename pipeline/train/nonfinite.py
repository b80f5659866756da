"""A loss that is not finite ends training on all ranks together, before the step that it would have spoiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeline.core.distributed import World
from pipeline.core.errors import TrainingError

Terms = dict[str, Tensor]
SHOWN = 4
SMALLEST_SCALE = 1.0
"""Of the loss in fp16; below it nothing is left to lower."""


def is_nonfinite(norm: Tensor, parts: Sequence[tuple[Tensor, Terms]], scaler: GradScaler, world: World) -> bool:
    """Whether this step must not be taken, the same on all ranks; a collective where ``norm`` is not finite.

    Args:
        norm: of the gradients averaged over all ranks, and so the same on each.
        parts: samples [B] and loss terms [B] of what this rank computed.
        scaler: of the loss; where it is on, gradients too large for fp16 are skipped by it while losses are finite.
        world: all ranks.
    """
    if torch.isfinite(norm):
        return False
    if not scaler.is_enabled() or scaler.get_scale() <= SMALLEST_SCALE:
        return True
    own = any(not torch.isfinite(values).all() for _, terms in parts for values in terms.values())
    return bool(world.sum(torch.tensor(int(own), device=world.device)))


def nonfinite_error(
    step: int, parts: Sequence[tuple[Tensor, Terms]], name: Callable[[int], str], world: World
) -> TrainingError:
    """The error of a spoiled step, naming pages of all ranks; ``name`` gives a sample's key. A collective."""
    at_fault = [
        f"{term} {float(value):.4g} on {name(sample)}"
        for samples, terms in parts
        for term, values in terms.items()
        for sample, value in zip(samples.tolist(), values.detach(), strict=True)
        if not torch.isfinite(value)
    ]
    pages = [name(sample) for samples, _ in parts for sample in samples.tolist()]
    names = list(parts[0][1])
    own = torch.stack([torch.cat([terms[term].detach().double() for _, terms in parts]).sum() for term in names])
    sums = world.sum(own).tolist()
    gathered = world.gather((at_fault, pages))
    faults = [fault for rank_faults, _ in gathered for fault in rank_faults]
    where = faults or [f"pages {', '.join(page for _, own_pages in gathered for page in own_pages)}"]
    terms_said = ", ".join(f"{term} {value:.4g}" for term, value in zip(names, sums, strict=True))
    more = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
    return TrainingError(
        f"step {step}: gradients are not finite ({'; '.join(where[:SHOWN])}{more}; sums of the batch: {terms_said}); "
        "the step was not taken; lower schedule.lr, set schedule.clip_norm, or look at those pages"
    )
