"""Precision, memory format and compilation of the student, and the moving average of its weights."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from graphkd.detectors import DetectorModule
from graphkd.distill import TrainingStep
from pipeline.config.schema import ComputeConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUBLAS_WORKSPACE = ":4096:8"  # needed for deterministic results, by cuBLAS's manual


def configure_determinism(compute: ComputeConfig) -> None:
    """Set process-wide determinism. Call before a GPU is used."""
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(compute.deterministic)


def apply_precision_and_compile(module: TrainingStep, compute: ComputeConfig) -> TrainingStep:
    """Apply the memory format, and compile the step or the student's backbone. Names of tensors stay."""
    apply_memory_format(module, compute)
    if compute.compile == "step":
        module.losses = torch.compile(module.losses, dynamic=False)  # type: ignore[method-assign]
    else:
        compile_parts(module.detector, compute)
    return module


def apply_memory_format(module: nn.Module, compute: ComputeConfig) -> None:
    """Apply the memory format of ``compute``."""
    if compute.channels_last:
        module.to(memory_format=torch.channels_last)


def compile_parts(detector: DetectorModule, compute: ComputeConfig) -> None:
    """Compile the parts with fixed shapes, if ``compute`` asks for compilation."""
    if compute.compile:
        for part in detector.compilable_modules():
            part.compile(dynamic=False)


def autocast(compute: ComputeConfig, device: torch.device) -> torch.autocast:
    """Context of the student's forward pass."""
    return torch.autocast(device.type, DTYPES[compute.precision], enabled=compute.precision != "fp32")


def grad_scaler(compute: ComputeConfig, device: torch.device) -> GradScaler:
    """Loss scaler for fp16, whose small gradients would underflow. Disabled otherwise."""
    return GradScaler(device.type, enabled=compute.precision == "fp16")


class WeightEma:
    """Exponential moving average of a module's parameters. Buffers are copied from the newest step.

    Args:
        module: trained module, before it is wrapped or compiled.
        decay: share of the average kept in each step, 0 to 1; 0 disables.
    """

    def __init__(self, module: TrainingStep, decay: float) -> None:
        self._module = module
        self._averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None

    @property
    def module(self) -> nn.Module | None:
        """Module with averaged weights; None if disabled."""
        return None if self._averaged is None else self._averaged.module

    @property
    def detector(self) -> DetectorModule:
        """Detector to evaluate: the averaged one if enabled."""
        step = self._module if self._averaged is None else self._averaged.module
        assert isinstance(step, TrainingStep)
        return step.detector

    def update(self) -> None:
        """Include the weights after a step; the first ones are copied."""
        if self._averaged is not None:
            self._averaged.update_parameters(self._module)

    def resume(self, step: int) -> None:
        """Continue after ``step`` steps, whose average :attr:`module` holds."""
        if self._averaged is not None:
            self._averaged.n_averaged.fill_(step)
