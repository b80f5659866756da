"""Means, spreads and paired gains of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarise(
    rows: Sequence[Mapping[str, Any]], variants: Sequence[str], baseline: str = "none"
) -> list[dict[str, Any]]:
    """Each variant's mean AP, spread over seeds, and gain over ``baseline`` seed by seed, in AP points.

    Spreads are sample standard deviations; ``noise`` is the standard error of the mean gain, None with one seed.
    """
    scores = {name: {row["seed"]: 100 * row["ap"] for row in rows if row["variant"] == name} for name in variants}
    alone = scores.get(baseline, {})
    summary = []
    for name, own in scores.items():
        if not own:
            continue
        gains = [score - alone[seed] for seed, score in own.items() if seed in alone]
        summary.append(
            {
                "variant": name,
                "seeds": len(own),
                "ap": statistics.mean(own.values()),
                "spread": _spread(list(own.values())),
                "gain": statistics.mean(gains) if gains else None,
                "noise": _spread(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
            }
        )
    return summary


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(summary: Sequence[Mapping[str, Any]]) -> None:
    """Print a summary as a markdown table."""
    print("| variant | seeds | AP | spread | gain over none |")
    print("|---|---|---|---|---|")
    for row in summary:
        noise = "" if row["noise"] is None else f" ± {row['noise']:.1f}"
        gain = "" if row["gain"] is None else f"{row['gain']:+.1f}{noise}"
        print(f"| {row['variant']} | {row['seeds']} | {row['ap']:.1f} | {row['spread']:.1f} | {gain} |")
