"""Checkpoints: whole or absent, checked before use, nothing unpickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.core.errors import CheckpointError, OutputError
from pipeline.core.files import sha256_file, write_json
from pipeline.runs.checkpoint import (
    load_weights,
    newest_checkpoint,
    open_checkpoint,
    restore_module,
    restore_optimizer,
)
from pipeline.runs.checkpoint_writer import CheckpointWriter, prune, take_snapshot, write_checkpoint


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    module, optimizer = trained()
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "checkpoints", take_snapshot(step, module, optimizer, {"data": {"seed": 5}}))
        prune(tmp_path / "checkpoints", keep=2)
    return tmp_path / "checkpoints"


def test_weights_and_optimizer_come_back_exactly(root: Path) -> None:
    module, optimizer = trained()
    other, other_optimizer = trained(seed=1)
    checkpoint = newest_checkpoint(root)
    assert checkpoint is not None and checkpoint.step == 3
    restore_module(other, load_weights(checkpoint.folder / "model.safetensors"), checkpoint.folder)
    restore_optimizer(other_optimizer, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    first, second = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(torch.equal(first[i]["exp_avg"], second[i]["exp_avg"]) for i in first)


def test_only_the_newest_are_kept_and_no_temporary_file(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_checkpoint_is_skipped(root: Path, name: str, damage: str) -> None:
    path = root / "step-00000003" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    found = newest_checkpoint(root)
    assert found is not None and found.step == 2
    with pytest.raises(CheckpointError):
        open_checkpoint(path.parent)


def test_empty_and_other_folders_are_no_checkpoints(root: Path) -> None:
    (root / "step-00000009").mkdir()
    (root / "notes").mkdir()
    found = newest_checkpoint(root)
    assert found is not None and found.step == 3
    assert newest_checkpoint(root / "absent") is None


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")


def test_checkpoints_of_which_none_can_be_used_are_not_absent(root: Path) -> None:
    for folder in root.iterdir():
        damage(folder)
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints in .* can be used \(.*step-00000003 is damaged"
    ):
        newest_checkpoint(root)


def test_a_newest_checkpoint_of_another_release_is_not_passed_over(root: Path) -> None:
    folder = root / "step-00000003"
    state = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", {**state, "version": 99})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = sha256_file(folder / "state.json")
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="step-00000003 has version 99, but this release reads 1"):
        newest_checkpoint(root)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_newest_checkpoint_that_cannot_be_read_is_not_passed_over(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def failing(path: Path, *arguments: Any, **named: Any) -> str:
        if path.parent.name == "step-00000003":
            raise OSError(code, os.strerror(code))
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(CheckpointError, match=f"step-00000003 cannot be read \\({os.strerror(code)}\\)"):
        newest_checkpoint(root)


def test_pruning_counts_only_checkpoints_that_can_be_used(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    module, optimizer = trained()
    for step in range(1, 6):
        write_checkpoint(root, take_snapshot(step, module, optimizer, {}))
    for step in (3, 4):
        damage(root / f"step-{step:08d}")
    prune(root, keep=2)
    found = newest_checkpoint(root)
    assert found is not None and found.step == 5
    assert open_checkpoint(root / "step-00000002").step == 2 and not (root / "step-00000001").exists()
    for step in (2, 5):
        damage(root / f"step-{step:08d}")
    before = sorted(path.name for path in root.iterdir())
    prune(root, keep=1)
    assert sorted(path.name for path in root.iterdir()) == before


def test_weights_without_counts_of_batches_are_accepted(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    tensors = {name: value for name, value in module.state_dict().items() if "num_batches_tracked" not in name}
    restore_module(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"1\.weight missing"):
        restore_module(module, {name: value for name, value in tensors.items() if name != "1.weight"}, tmp_path)


def test_another_architecture_is_named(root: Path) -> None:
    checkpoint = newest_checkpoint(root)
    assert checkpoint is not None
    tensors = load_weights(checkpoint.folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"another architecture: 2 tensors differ \(weight is \(2, 3\), not \(4, 3\)"
    ):
        restore_module(nn.Linear(3, 4), tensors, checkpoint.folder)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_nothing_is_unpickled_from_weights(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="no file of plain tensors"):
        load_weights(tmp_path / name)
    torch.save({"model": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="no file of plain tensors"):
        load_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_no_mapping_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        load_weights(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="do not exist"):
        load_weights(tmp_path / "absent.pth")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.core.files.sync_file", full)
    module, optimizer = trained()
    with pytest.raises(OutputError, match="no space left"):
        write_checkpoint(tmp_path / "checkpoints", take_snapshot(1, module, optimizer, {}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_snapshot_is_not_changed_by_later_steps(tmp_path: Path) -> None:
    module, optimizer = trained()
    taken = take_snapshot(1, module, optimizer, {})
    before = {name: value.clone() for name, value in taken.model.items()}
    moments = taken.optimizer["state"][0]["exp_avg"].clone()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(taken.model[name], before[name]) for name in before)
    assert torch.equal(taken.optimizer["state"][0]["exp_avg"], moments)
    assert not torch.equal(module.state_dict()["weight"], before["weight"])


def test_every_nth_and_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    module, optimizer = trained()
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=3)
    for step in range(1, 9):
        writer.save(take_snapshot(step, module, optimizer, {}))
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_an_error_of_the_writing_thread_is_raised_in_the_run(tmp_path: Path) -> None:
    module, optimizer = trained()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2)
    writer.save(take_snapshot(1, module, optimizer, {}))
    with pytest.raises(OutputError, match="give a folder that you have write access to"):
        writer.save(take_snapshot(2, module, optimizer, {}))


def test_what_a_killed_writer_left_is_removed_by_the_next(root: Path) -> None:
    module, optimizer = trained()
    (root / ".step-00000004.building").mkdir()
    (root / ".step-00000004.building" / "model.safetensors").write_bytes(b"half")
    (root / "step-00000001").mkdir()  # what is left of one that was being pruned: no manifest
    (root / "step-00000001" / "optimizer.pt").write_bytes(b"rest")
    write_checkpoint(root, take_snapshot(5, module, optimizer, {}))
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003", "step-00000005"]
