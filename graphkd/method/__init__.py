"""GraphKD's graph and losses as pure, batched functions of tensors.

After Banerjee et al., "GraphKD: Exploring Knowledge Distillation Towards Document Object Detection with Structured
Graph Creation" (ICDAR 2024, arXiv 2402.11401). ``docs/method.md`` explains the choices that the
paper leaves open. Symbols: ``B`` pages, ``N`` nodes per page (padded), ``C`` channels, ``P`` pooled side,
``K`` classes.
"""

from graphkd.method.adjacency import adjacency
from graphkd.method.baselines import DsigWeights, PkdWeights, dsig_loss, pkd_loss
from graphkd.method.edges import CovarianceAccumulator, cosine_lengths, edge_lengths, whitening
from graphkd.method.graph import GraphConfig, StructuredGraph, build_graph, node_lengths
from graphkd.method.losses import LossWeights, graphkd_loss
from graphkd.method.merging import Merge, merge_text_nodes
from graphkd.method.statistics import StatisticsAccumulator, TeacherStatistics
from graphkd.method.text import text_score

__all__ = [
    "CovarianceAccumulator",
    "DsigWeights",
    "GraphConfig",
    "LossWeights",
    "Merge",
    "PkdWeights",
    "StatisticsAccumulator",
    "StructuredGraph",
    "TeacherStatistics",
    "adjacency",
    "build_graph",
    "cosine_lengths",
    "dsig_loss",
    "edge_lengths",
    "graphkd_loss",
    "merge_text_nodes",
    "node_lengths",
    "pkd_loss",
    "text_score",
    "whitening",
]
