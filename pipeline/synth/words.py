"""The vocabulary of synthetic pages and sentences drawn from it."""

from __future__ import annotations

import numpy as np

WORDS = """
the of and to in a is that for it as was with be by on not his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many off before must well back through years much where your way down should because long each
just state those people too mr how little good world make very year still see own work men day get here old life both
between being under three never know same last another while us might great go come since against right came take used
himself few house use place during high without again home around small however found large number model data graph
method result figure section value system measure layer page region feature network edge node teacher student training
sample error table column document layout image text title caption detector distance market report annual revenue
growth capital council district regulation article paragraph annex authority budget water energy river valley forest
season harvest village bridge railway engine factory harbour vessel voyage island cell protein enzyme membrane tissue
patient clinical trial dose therapy symptom vaccine mineral crystal surface temperature pressure velocity spectrum
orbit galaxy particle photon quantum lattice entropy gradient tensor matrix theorem lemma proof function integral
boundary convergence estimate variance likelihood hypothesis experiment history language culture museum painting
theatre music poem novel letter chapter author editor printing archive
"""
VOCABULARY = tuple(WORDS.split())
SYMBOLS = ("α", "β", "γ", "λ", "μ", "σ", "θ", "x", "y", "z", "n", "k", "f(x)", "g(t)", "∂u", "∇φ", "Σ", "∫", "∏", "√n")
OPERATORS = ("+", "−", "=", "≤", "·", "→", "∈", "≈")


def words(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` words with the capitals and full stops of sentences."""
    chosen = [VOCABULARY[place] for place in rng.integers(0, len(VOCABULARY), count)]
    begin = True
    for place, stop in enumerate(rng.random(count) < 0.1):
        if begin:
            chosen[place] = chosen[place].capitalize()
        begin = bool(stop)
        chosen[place] += "." if stop else ""
    return chosen


def heading(rng: np.random.Generator, low: int, high: int) -> str:
    """A phrase of ``low`` to ``high`` words without a full stop."""
    return " ".join(word.rstrip(".") for word in words(rng, int(rng.integers(low, high + 1))))


def formula(rng: np.random.Generator, terms: int) -> str:
    """Symbols joined by operators."""
    parts = []
    for place in range(terms):
        parts.append(SYMBOLS[int(rng.integers(len(SYMBOLS)))])
        if place < terms - 1:
            parts.append(OPERATORS[int(rng.integers(len(OPERATORS)))])
    return " ".join(parts)
