"""DocLayNet's classes (Pfitzmann et al., KDD 2022), in the order of its category ids."""

from __future__ import annotations

CATEGORIES = (
    "Caption",
    "Footnote",
    "Formula",
    "List-item",
    "Page-footer",
    "Page-header",
    "Picture",
    "Section-header",
    "Table",
    "Text",
    "Title",
)
TEXT_CATEGORIES = frozenset(CATEGORIES) - {"Formula", "Picture", "Table"}
"""Classes of text, for the graph's two categories."""
