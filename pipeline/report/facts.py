"""What the report says in words: which run won, what distillation gained, and what to be careful about."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.report.runs import RunSummary

Role = Literal["teacher", "distilled student", "trained alone"]
MISSING = "\N{EN DASH}"
EQUAL_POINTS = 0.05
"""AP points below which two results print alike."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A distilled run, and the run that shows what it would be without its teacher."""

    distilled: RunSummary
    alone: RunSummary
    teacher: RunSummary | None
    same_detector: bool

    @property
    def gain(self) -> float:
        """AP points that distillation gained, negative where it cost some."""
        return ap(self.distilled) - ap(self.alone)


def ap(run: RunSummary, key: str = "ap") -> float:
    """A figure of the evaluation in points of 100, NaN where it is missing or not defined."""
    value = (run.evaluation or {}).get(key)
    return math.nan if value is None or value < 0 else 100 * float(value)


def role(run: RunSummary, runs: Sequence[RunSummary]) -> Role:
    """What the run is among ``runs``."""
    if run.distilled:
        return "distilled student"
    return "teacher" if any(_teacher_of(other, runs) is run for other in runs) else "trained alone"


def compare(runs: Sequence[RunSummary]) -> Comparison | None:
    """The best distilled run against a run alone, of the same detector where there is one; None without such a pair."""
    measured = [run for run in runs if not math.isnan(ap(run))]
    distilled = [run for run in measured if run.distilled]
    alone = [run for run in measured if role(run, runs) == "trained alone"]
    if not distilled or not alone:
        return None
    best = max(distilled, key=ap)
    same = [run for run in alone if run.config.get("detector") == best.config.get("detector")]
    return Comparison(best, max(same or alone, key=ap), _teacher_of(best, runs), bool(same))


def headline(runs: Sequence[RunSummary]) -> str:
    """One sentence: what distillation gained, or else which run won."""
    comparison = compare(runs)
    if comparison is not None:
        return _gain_sentence(comparison)
    ranked = sorted((run for run in runs if not math.isnan(ap(run))), key=ap, reverse=True)
    if not ranked:
        return "No run has been evaluated yet."
    best = ranked[0]
    if len(ranked) == 1:
        return f"{best.label} reaches {ap(best):.1f} AP."
    lead = ap(best) - ap(ranked[1])
    if lead < EQUAL_POINTS:
        return f"{best.label} and {ranked[1].label} are level at {ap(best):.1f} AP."
    return f"{best.label} wins with {ap(best):.1f} AP, {lead:.1f} points ahead of {ranked[1].label}."


def details(runs: Sequence[RunSummary]) -> list[str]:
    """Sentences that go with the headline: the teacher, the best run, and why to be careful."""
    sentences = []
    comparison = compare(runs)
    if comparison is not None:
        sentences += [_pair_sentence(comparison), *_teacher_sentences(comparison)]
    return [*sentences, *_cautions(runs, comparison)]


def differences(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Dotted config keys whose values differ between runs, with one text a run; a dash where a run lacks the key."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    groups = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    rows = {}
    for key in keys:
        values = [MISSING if config.get(key) is None else _plain(config[key]) for config in flat]
        if key not in groups and key not in ("name", "run.folder") and len(set(values)) > 1:
            rows[key] = values
    return rows


def commands(runs: Sequence[RunSummary]) -> list[str]:
    """Shell lines that train every run again under another name and make this report of the first ones."""
    lines = []
    for run in runs:
        name = f"{run.config.get('name', run.folder.resolve().name)}-again"
        keyed = (run.config.get("run") or {}).get("folder")
        folder = [f"run.folder={Path(str(keyed)).with_name(name)}"] if keyed else []
        lines.append(shlex.join(["graphkd", "train", str(run.folder / "config.yaml"), f"name={name}", *folder]))
    return [*lines, shlex.join(["graphkd", "report", *(str(run.folder) for run in runs)])]


def _gain_sentence(comparison: Comparison) -> str:
    if abs(comparison.gain) < EQUAL_POINTS:
        return f"Distillation changed nothing: with and without it, {ap(comparison.alone):.1f} AP."
    verb = "gained" if comparison.gain > 0 else "cost"
    return (
        f"Distillation {verb} {abs(comparison.gain):.1f} AP points: {ap(comparison.distilled):.1f} with it, "
        f"{ap(comparison.alone):.1f} without."
    )


def _pair_sentence(comparison: Comparison) -> str:
    other = "the same detector" if comparison.same_detector else "another detector"
    return f"{comparison.distilled.label} is compared with {comparison.alone.label}, {other} trained alone."


def _teacher_sentences(comparison: Comparison) -> list[str]:
    teacher, gain = comparison.teacher, comparison.gain
    if teacher is None or math.isnan(ap(teacher)):
        return []
    gap = ap(teacher) - ap(comparison.alone)
    if gap < EQUAL_POINTS:
        return [f"The teacher reaches {ap(teacher):.1f} AP, no more than the student trained alone."]
    closed = f", so distillation closed {100 * gain / gap:.0f} % of the gap of {gap:.1f} points" if gain > 0 else ""
    return [f"The teacher reaches {ap(teacher):.1f} AP{closed}."]


def _cautions(runs: Sequence[RunSummary], comparison: Comparison | None) -> list[str]:
    cautions = []
    if comparison is not None and comparison.gain < 0:
        cautions.append("Here the student did better without its teacher.")
    pairs = [comparison.distilled, comparison.alone] if comparison is not None else runs
    if len({_value(run.config, "data", "val") for run in runs if run.evaluation}) > 1:
        cautions.append("The runs were evaluated on different pages, so their figures cannot be compared.")
    if len({trained_steps(run) for run in pairs if trained_steps(run)}) > 1:
        cautions.append("The runs compared were trained for different numbers of steps.")
    if len([run for run in runs if run.evaluation]) > 1:
        cautions.append(
            "Each figure is one training from one seed; repeat with other seeds before trusting a point of difference."
        )
    return cautions


def trained_steps(run: RunSummary) -> int | None:
    """Optimiser steps behind the figures: those of the evaluation, else the last one logged."""
    step = (run.evaluation or {}).get("step") or (run.metrics[-1]["step"] if run.metrics else None)
    return None if step is None else int(step)


def _teacher_of(run: RunSummary, runs: Sequence[RunSummary]) -> RunSummary | None:
    named = _value(run.config, "teacher", "run")
    if not run.distilled or named is None:
        return None
    others = [other for other in runs if other is not run]
    exact = [other for other in others if other.folder.resolve() == Path(str(named)).resolve()]
    alike = [other for other in others if other.folder.resolve().name == Path(str(named)).name]
    return next(iter(exact or alike), None)


def _value(config: dict[str, Any], section: str, key: str) -> Any:
    content = config.get(section)
    return content.get(key) if isinstance(content, dict) else None


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(entry) for entry in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
