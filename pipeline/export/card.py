"""The model card of a bundle."""

from __future__ import annotations

from pathlib import Path

from pipeline.export.gate import Parity
from pipeline.predict.model import BUNDLE_FILE
from pipeline.predict.native import NativeModel

USE = """```python
import graphkd

model = graphkd.load("{name}")
for page in model.predict("file.pdf"):
    print(page.labels, page.boxes, page.scores)
```"""


def model_card(model: NativeModel, parity: Parity, data: str, folder: Path) -> str:
    """Markdown with classes, sizes, origin and agreement."""
    config, teacher = model.config, model.config.teacher
    parameters = sum(value.numel() for value in model.detector.parameters())
    rows = {
        "detector": f"{config.detector.architecture}, {config.detector.backbone}",
        "parameters": f"{parameters / 1e6:.2f} million",
        "file": f"{BUNDLE_FILE}, {parity.precision}, {(folder / BUNDLE_FILE).stat().st_size / 1e6:.1f} MB",
        "canvas": f"{model.view.canvas[0]} x {model.view.canvas[1]} px",
        "training data": str(config.data.train),
        "method": config.method.name,
        "teacher": "none" if teacher is None or config.method.name == "none" else str(teacher.run),
        "run": f"{config.name}, step {model.checkpoint.step}",
    }
    agreement = {
        "pages compared": f"{parity.pages} of {data}",
        "AP of the trained model": _percent(parity.ap_native),
        "AP of this file": _percent(parity.ap_exported),
        "largest difference of a box": f"{parity.box_difference:.1e} of the page",
        "largest difference of a score": f"{parity.score_difference:.1e}",
        "regions without a counterpart": f"{parity.unmatched} of {parity.regions}",
    }
    warning = (
        [f"> **Warning:** differs from the trained model: {'; '.join(parity.faults)}.", ""] if parity.faults else []
    )
    return "\n".join(
        [
            f"# {config.name}",
            "",
            *warning,
            "A detector of layout regions, exported by graphkd.",
            "",
            *_table(rows),
            "",
            "## Agreement with the trained model",
            "",
            *_table(agreement),
            "",
            "## Classes",
            "",
            ", ".join(model.class_names),
            "",
            "## Use",
            "",
            USE.format(name="this folder"),
            "",
            "The licence is that of the training data and of the weights that training started from.",
            "",
        ]
    )


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items())]


def _percent(value: float | None) -> str:
    return "not measured, since the pages have no regions" if value is None else f"{100 * value:.2f}"
