"""Packs the real sets of the study, with whole documents held out of training for development.

    python -m benchmarks.real_data --source FOLDER --out data/real

FOLDER holds ``gallica-prints-train/annotations.json`` and ``images/``, and so on. Every sixth document of a training
set, in the order of their names, goes to OUT/SET/dev, the others to OUT/SET/train, the test set to OUT/SET/test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SETS = {
    "gallica-prints": ("gallica-prints-train", "gallica-prints-val"),
    "polish-gov": ("polish-gov-train", "polish-gov-val"),
    "publaynet": ("publaynet-100", "publaynet-examples"),
}
EVERY = 6


def document(image: dict[str, Any]) -> str:
    """Name of the document that a page is of; the page itself where none is told."""
    return str(image.get("doc_name") or image["file_name"])


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and development part, of different documents."""
    held = set(sorted({document(image) for image in content["images"]})[EVERY - 1 :: EVERY])
    parts = []
    for development in (False, True):
        images = [image for image in content["images"] if (document(image) in held) == development]
        ids = {image["id"] for image in images}
        regions = [each for each in content["annotations"] if each["image_id"] in ids]
        parts.append({**content, "images": images, "annotations": regions})
    return parts[0], parts[1]


def pack_set(name: str, source: Path, out: Path) -> None:
    """Pack the three parts of a set."""
    from pipeline.data.prepare.pack import pack

    train, test = (source / folder for folder in SETS[name])
    content = json.loads((train / "annotations.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    for part, kept in zip(("train", "dev"), split(content), strict=True):
        listed = out / f"{part}.json"
        listed.write_text(json.dumps(kept))
        pack(listed, train / "images", out / part, samples_per_shard=64, repair=True)
        print(f"{name}: {part} has {len(kept['images'])} pages, {len(kept['annotations'])} regions")
    pack(test / "annotations.json", test / "images", out / "test", samples_per_shard=64, repair=True)


def main() -> None:
    """Pack the sets that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for name, (train, _) in SETS.items():
        if (given.source / train).is_dir() and not (given.out / name / "test" / "dataset.json").exists():
            pack_set(name, given.source, given.out / name)


if __name__ == "__main__":
    main()
