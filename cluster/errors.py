"""Errors of jobs on a cluster."""

from __future__ import annotations

from graphkd.errors import UserError


class ClusterError(UserError):
    """The nodes of a job did not come together, or one of them failed; the message names it and the reason."""
