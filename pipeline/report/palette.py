"""Colours that stay apart for readers with colour blindness, shared by charts and pages."""

from __future__ import annotations

RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""For runs: Okabe and Ito's palette, without the yellow that is lost on white."""

CLASS_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#332288", "#882255", "#117733"),
    *("#56B4E9", "#999933", "#CC6677", "#661100", "#44AA99", "#6B6B6B", "#CC79A7", "#7A5C00"),
)
"""For classes: Okabe and Ito's and Tol's muted palettes. With this many, a name always stands beside the colour."""


def run_colour(place: int) -> str:
    """Colour of the run at ``place`` in the report, as ``#RRGGBB``."""
    return RUN_COLOURS[place % len(RUN_COLOURS)]


def class_colour(number: int) -> str:
    """Colour of a 0-based class, as ``#RRGGBB``."""
    return CLASS_COLOURS[number % len(CLASS_COLOURS)]


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on ``#RRGGBB``."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#FFFFFF"
