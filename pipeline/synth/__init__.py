"""Synthetic document pages with layout annotations, for trying the pipeline without a dataset."""

from pipeline.synth.categories import CATEGORIES, TEXT_CATEGORIES
from pipeline.synth.page import Region, draw_page
from pipeline.synth.write import write_pages

__all__ = ["CATEGORIES", "TEXT_CATEGORIES", "Region", "draw_page", "write_pages"]
