"""Ending training on all ranks together when a loss is not finite, before the optimizer step that it would corrupt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeline.core.distributed import World
from pipeline.core.errors import TrainingError

Terms = dict[str, Tensor]
"""Loss terms by name, each [B]."""
MAX_FAULTS = 4  # listed in the error
MIN_LOSS_SCALE = 1.0  # of fp16; below it, lowering the scale cannot help


def is_nonfinite(norm: Tensor, parts: Sequence[tuple[Tensor, Terms]], scaler: GradScaler, world: World) -> bool:
    """Whether this step must not be taken; the same on all ranks. A collective if ``norm`` is not finite.

    Args:
        norm: norm of the gradients averaged over all ranks, hence the same on each.
        parts: samples [B] and loss terms [B] of this rank's micro-batches.
        scaler: loss scaler. If enabled, it skips steps whose gradients overflow fp16 while losses are finite.
        world: all ranks.
    """
    if torch.isfinite(norm):
        return False
    if not scaler.is_enabled() or scaler.get_scale() <= MIN_LOSS_SCALE:
        return True
    own = any(not torch.isfinite(values).all() for _, terms in parts for values in terms.values())
    return bool(world.all_reduce_sum(torch.tensor(int(own), device=world.device)))


def nonfinite_error(
    step: int, parts: Sequence[tuple[Tensor, Terms]], sample_key: Callable[[int], str], world: World
) -> TrainingError:
    """Error of a non-finite step, naming the samples at fault on all ranks. A collective.

    Args:
        step: number of the step.
        parts: samples [B] and loss terms [B] of this rank's micro-batches.
        sample_key: returns the key of a sample number.
        world: all ranks.
    """
    at_fault = [
        f"{term} {float(value):.4g} on {sample_key(sample)}"
        for samples, terms in parts
        for term, values in terms.items()
        for sample, value in zip(samples.tolist(), values.detach(), strict=True)
        if not torch.isfinite(value)
    ]
    keys = [sample_key(sample) for samples, _ in parts for sample in samples.tolist()]
    names = list(parts[0][1])
    own = torch.stack([torch.cat([terms[term].detach().double() for _, terms in parts]).sum() for term in names])
    sums = world.all_reduce_sum(own).tolist()
    gathered = world.all_gather_object((at_fault, keys))
    faults = [fault for rank_faults, _ in gathered for fault in rank_faults]
    faults = faults or [f"pages {', '.join(key for _, rank_keys in gathered for key in rank_keys)}"]
    sums_text = ", ".join(f"{term} {value:.4g}" for term, value in zip(names, sums, strict=True))
    more = f" and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
    return TrainingError(
        f"step {step}: gradients are not finite ({'; '.join(faults[:MAX_FAULTS])}{more}; sums of the batch: "
        f"{sums_text}); the step was not taken; lower schedule.lr, set schedule.clip_norm, or check those pages"
    )
