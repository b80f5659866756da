"""Flip bytes of files, and see that a reader gives the same result or one clear line: ``python -m tests.support.fuzz``.

Runs in a process of its own, so that a crash of a native library is seen as one. Prints what broke the rule as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from graphkd.errors import UserError

Reader = Callable[[Path], str]
"""Reads everything in a folder and returns a digest of the result."""


def read_dataset(folder: Path | str, storage: Any = None) -> str:
    """Boxes, classes, names and pixels of every page."""
    from pipeline.data.format.dataset import PackedDataset

    dataset, digest = PackedDataset(folder, storage), sha256()
    digest.update(
        json.dumps([[entry.model_dump() for entry in dataset.class_entries], dataset.identity, len(dataset)]).encode()
    )
    for number in range(len(dataset)):
        sample = dataset.sample(number)
        for values in (sample.boxes, sample.classes, sample.crowd, sample.areas, np.asarray(dataset.image(sample))):
            digest.update(np.ascontiguousarray(values).tobytes())
        digest.update(json.dumps([sample.key, sample.image_id, sample.file_name, sample.size]).encode())
    return digest.hexdigest()


def read_cache(folder: Path) -> str:
    """Signals of every page in the cache below ``folder`` of the dataset beside it, and the statistics."""
    from pipeline.config import load_config
    from pipeline.context import RunContext
    from pipeline.data.loading.loader import PageDataset, collate
    from pipeline.data.loading.order import SampleRef
    from pipeline.train.signal_source import open_cache

    context = RunContext(load_config(folder / "student.yaml", [f"teacher.cache={folder / 'cache'}"]))
    cache, statistics = open_cache(context), context.statistics
    pages = PageDataset(context.dataset, context.config.data.view, 0, context.config.views)
    signals = cache.signals(collate([pages[SampleRef(0, number)] for number in range(len(context.dataset))]))
    digest = sha256()
    tensors = [signals.boxes, signals.valid, signals.scores, signals.classes, signals.logits, signals.deltas]
    for values in [*tensors, signals.pooled, statistics.mean, statistics.covariance, statistics.whitening]:
        assert values is not None
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(folder: Path) -> str:
    """Weights, optimizer and state of the newest checkpoint."""
    import torch

    from pipeline.runs.checkpoint import OPTIMIZER, load_weights, newest_checkpoint

    checkpoint, digest = newest_checkpoint(folder), sha256()
    assert checkpoint is not None
    for name, values in sorted(load_weights(checkpoint.weights).items()):
        digest.update(name.encode() + values.numpy().tobytes())
    optimizer = torch.load(checkpoint.folder / OPTIMIZER, weights_only=True)
    digest.update(repr(optimizer).encode() + json.dumps(checkpoint.state, sort_keys=True).encode())
    return digest.hexdigest()


def read_pickle(folder: Path) -> str:
    """Weights of another program, which nothing vouches for: only crashes and other errors count."""
    from pipeline.detectron2.checkpoint import read_checkpoint as read_weights

    for path in sorted(folder.glob("*.pkl")):
        assert all(values.dtype.is_floating_point or values.numel() >= 0 for values in read_weights(path).values())
    return "read"


READERS: dict[str, Reader] = {
    "dataset": read_dataset,
    "cache": read_cache,
    "checkpoint": read_checkpoint,
    "pickle": read_pickle,
}


def broken_rules(reader: Reader, folder: Path, pattern: str, flips: int, seed: int) -> Iterator[dict[str, Any]]:
    """Flip one bit at a time in files that match ``pattern``; yield what gave other results or no clear line."""
    random, expected = np.random.default_rng(seed), reader(folder)
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    for _ in range(flips):
        path = files[int(random.integers(len(files)))]
        original = path.read_bytes()
        place, bit = int(random.integers(len(original))), int(random.integers(8))
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << bit]) + original[place + 1 :])
        fault = _fault(reader, folder, expected)
        path.write_bytes(original)
        if fault is not None:
            yield {"file": str(path.relative_to(folder)), "byte": place, "bit": bit, "fault": fault}


def _fault(reader: Reader, folder: Path, expected: str) -> str | None:
    try:
        return None if reader(folder) == expected else "another result"
    except UserError as error:
        return "an error of several lines" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def main() -> None:
    """Arguments: reader, folder (which is copied), pattern of files, number of flips, seed."""
    name, source, pattern, flips, seed = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(source, Path(scratch) / "copy"))
        sys.stdout.write(json.dumps(list(broken_rules(READERS[name], folder, pattern, int(flips), int(seed)))))


if __name__ == "__main__":
    main()
