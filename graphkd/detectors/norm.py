"""Normalisation layers that are independent of the other pages in a batch."""

from __future__ import annotations

import math

from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from graphkd.detectors.config import Norm

GROUPS = 32  # of Wu and He (ECCV 2018), reduced if a layer's channels are not a multiple


def with_norm(backbone: nn.Module, norm: Norm) -> nn.Module:
    """Replace the batch norm of ``backbone`` by the normalisation ``norm``, and return the backbone.

    ``frozen`` makes its statistics constants, ``sync`` shares them between ranks (GPU only), ``group`` replaces it by
    GroupNorm, ``batch`` keeps it. Backbones without batch norm are unchanged.
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
