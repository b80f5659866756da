"""Normalisation layers that do not depend on which pages share a batch."""

from __future__ import annotations

import math

from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from graphkd.detectors.config import Norm

GROUPS = 32  # the group count of Wu and He (ECCV 2018), reduced where a layer's channels do not divide by it


def with_norm(backbone: nn.Module, norm: Norm) -> nn.Module:
    """Give ``backbone`` (built with batch norm) the normalisation that the config asks for.

    ``frozen`` keeps the statistics as constants, ``sync`` shares them between ranks (GPU only), ``group`` replaces
    them by GroupNorm, ``batch`` leaves them as they are. Backbones without batch norm come back unchanged.
    """
    if norm == "frozen":
        return freeze_batch_norm_2d(backbone)
    if norm == "sync":
        return convert_sync_batchnorm(backbone)
    if norm == "group":
        _replace_with_group_norm(backbone)
    return backbone


def _replace_with_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _group_norm_like(child))
        else:
            _replace_with_group_norm(child)


def _group_norm_like(norm: nn.BatchNorm2d) -> nn.Module:
    groups = math.gcd(GROUPS, norm.num_features)
    if not isinstance(norm, BatchNormAct2d):
        return nn.GroupNorm(groups, norm.num_features, eps=norm.eps)
    replacement = GroupNormAct(norm.num_features, num_groups=groups, eps=norm.eps, apply_act=False)
    replacement.drop, replacement.act = norm.drop, norm.act
    return replacement
