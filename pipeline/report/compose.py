"""Gathering what a report of given runs can show: the evaluated dataset, and the graph of a distilled run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from graphkd.errors import UserError
from pipeline.config import RunConfig
from pipeline.data.format.dataset import PackedDataset
from pipeline.models import load_run_config
from pipeline.report.graph import GraphPicture
from pipeline.report.html import write_report
from pipeline.report.runs import RunSummary
from pipeline.report.teacher_graph import teacher_graph

logger = logging.getLogger(__name__)


def report_runs(runs: Sequence[RunSummary], out: Path, title: str = "GraphKD runs", pages: int = 4) -> Path:
    """Write the report of ``runs`` with everything that their folders still allow to be drawn.

    Pages are those of the last run's ``data.val``; the graph is that of the first distilled run.
    """
    configs = [load_run_config(run.folder) for run in runs]
    dataset = _dataset(configs[-1])
    graph = _graph(configs, dataset)
    return write_report(list(runs), out, dataset=dataset, graph=graph, pages=pages, title=title)


def _dataset(config: RunConfig) -> PackedDataset | None:
    if config.data.val is None:
        return None
    try:
        return PackedDataset(config.data.val, config.data.storage)
    except UserError as error:
        logger.warning("the report shows no pages: %s", error)
        return None


def _graph(configs: Sequence[RunConfig], dataset: PackedDataset | None) -> GraphPicture | None:
    distilled = next((config for config in configs if config.method.name != "none"), None)
    if distilled is None or dataset is None:
        return None
    try:
        return teacher_graph(distilled, dataset)
    except UserError as error:
        logger.warning("the report shows no graph: %s", error)
        return None
