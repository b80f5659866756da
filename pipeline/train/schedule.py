"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config.schema import ScheduleConfig

ONE_CYCLE_WARMUP = 0.25  # share of the steps in which the rate rises
ONE_CYCLE_START = 1 / 25  # first rate over the peak, as in Smith and Topin (2018)
ONE_CYCLE_END = 1e-4  # last rate over the peak


def build_optimizer(module: nn.Module, schedule: ScheduleConfig) -> torch.optim.Optimizer:
    """Optimizer of ``schedule`` over all parameters with gradients; norms and biases have no weight decay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr)
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum)


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of a scaled schedule."""
    if schedule.policy == "one_cycle":
        return schedule.lr * _one_cycle(step, schedule.steps)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    factor = 1.0
    if schedule.policy == "multistep":
        factor = schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif schedule.policy == "cosine":
        factor = (1 + math.cos(math.pi * step / schedule.steps)) / 2
    return schedule.lr * warmup * factor


def _one_cycle(step: int, steps: int) -> float:
    rising = max(1.0, ONE_CYCLE_WARMUP * steps)
    if step < rising:
        return _cosine(ONE_CYCLE_START, 1.0, step / rising)
    return _cosine(1.0, ONE_CYCLE_END, (step - rising) / max(1.0, steps - 1 - rising))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
