"""Choosing entries of each page."""

from __future__ import annotations

from torch import Tensor


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """Entries of each page: [B, A, ...] at int64 [B, S] -> [B, S, ...]."""
    shape = (*indices.shape, *[1] * (values.ndim - 2))
    return values.gather(1, indices.view(shape).expand(*indices.shape, *values.shape[2:]))


def valid_rows(values: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """:func:`rows`, 0 where not ``valid`` [B, S]."""
    chosen = rows(values, indices)
    return chosen.masked_fill(~valid.view(*valid.shape, *[1] * (values.ndim - 2)), 0)


def first_rows(kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices [B, count] of the first entries that are kept, of bool [B, A], and which of them are valid."""
    order = (~kept).byte().argsort(dim=1, stable=True)[:, :count]
    return order, kept.gather(1, order)
