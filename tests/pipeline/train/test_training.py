"""Training end to end on small pages: teacher, cache, distilled student; going on; both engines."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from graphkd.errors import ConfigError, UserError
from pipeline.config import RunConfig, ScheduleConfig, resolve
from pipeline.context import RunContext
from pipeline.core.distributed import World
from pipeline.core.errors import CheckpointError, DataError, OutputError, TrainingError
from pipeline.data.format.dataset import PackedDataset
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.metrics import read_metrics
from pipeline.runs.run_folder import open_run_folder
from pipeline.train.loop import global_mean
from pipeline.train.run import evaluate_run, train_run
from pipeline.train.schedule import learning_rate
from pipeline.train.smoke import smoke
from pipeline.training_step import build_training_step
from tests.support.runs import SMALL_DETECTOR, build_here, small_run

pytestmark = pytest.mark.e2e

CPU = torch.device("cpu")


def small(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    return resolve(small_run(folder, packed, name, **changes), name)


def student(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    teacher = {"run": str(folder / "teacher"), "statistics_pages": 4, "nodes": {"count": 8, "min_score": 0.0}}
    merged = {"method": {"name": "graphkd"}, **changes, "teacher": {**teacher, **changes.get("teacher", {})}}
    return small(folder, packed, name, **merged)


@pytest.fixture(scope="module")
def trained(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a trained teacher and its cache."""
    folder = tmp_path_factory.mktemp("trained")
    train_run(RunContext(small(folder, dataset_folder, "teacher")))
    build_here(student(folder, dataset_folder, "any"))
    return folder


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.folder)]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None
    return load_weights(checkpoint.folder / "model.safetensors")


def test_a_run_leaves_config_metrics_checkpoint_and_figures(trained: Path, dataset_folder: Path) -> None:
    config = small(trained, dataset_folder, "teacher")
    figures = evaluate_run(RunContext(config))
    assert 0 <= figures["ap"] <= 1
    assert figures["step"] == 4
    assert json.loads((config.folder / "eval.json").read_text())["pages"] == 10
    assert (config.folder / "config.yaml").exists()
    assert [line["step"] for line in read_metrics(config.folder)] == [1, 2, 3, 4]
    assert all(0 <= line["data_wait"] <= 1 for line in read_metrics(config.folder))


def test_a_finished_run_is_not_trained_again(trained: Path, dataset_folder: Path) -> None:
    config = small(trained, dataset_folder, "teacher")
    before = (config.folder / "metrics.jsonl").read_bytes()
    train_run(RunContext(config))
    assert (config.folder / "metrics.jsonl").read_bytes() == before


def test_a_distilled_student_learns_from_the_cache(trained: Path, dataset_folder: Path) -> None:
    config = student(trained, dataset_folder, "distilled")
    train_run(RunContext(config))
    terms = read_metrics(config.folder)[-1]["terms"]
    assert {"kd_node", "kd_edge", "kd_logits", "kd_boxes", "loss_class"} <= set(terms)
    assert all(math.isfinite(value) for value in terms.values())


def test_resuming_gives_the_weights_of_an_uninterrupted_run(trained: Path, dataset_folder: Path) -> None:
    whole = student(trained, dataset_folder, "whole")
    train_run(RunContext(whole))
    parted = student(trained, dataset_folder, "parted")
    train_run(RunContext(parted))
    for path in sorted((parted.folder / "checkpoints").iterdir())[1:]:
        path.rename(parted.folder / f"lost-{path.name}")
    train_run(RunContext(parted))
    first, second = weights(whole), weights(parted)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(whole) == losses(parted)


def test_live_and_cached_teachers_give_the_same_losses(trained: Path, dataset_folder: Path) -> None:
    view = {"view": {"canvas": [128, 96], "shortest_edge": [96, 96]}}
    folder = trained / "same-view"
    train_run(RunContext(small(folder, dataset_folder, "teacher", data=view)))
    cached = student(folder, dataset_folder, "cached", data=view, teacher={"cache_dtype": "fp32"})
    build_here(cached)
    live = student(folder, dataset_folder, "live", data=view, teacher={"signals": "live"})
    train_run(RunContext(cached))
    train_run(RunContext(live))
    assert losses(cached) == pytest.approx(losses(live), rel=1e-4)


def test_views_of_a_cache_are_replayed(trained: Path, dataset_folder: Path) -> None:
    from pipeline.data.loading.loader import PageDataset, collate
    from pipeline.data.loading.order import SampleRef
    from pipeline.train.signal_source import signal_source

    settings = {"views": 2, "cache": str(trained / "two-views"), "cache_dtype": "fp32"}
    live = {"views": 2, "cache": str(trained / "two-views"), "signals": "live"}
    config = student(trained, dataset_folder, "views", teacher=settings)
    assert [shard.rows for shard in build_here(config).shards] == [8, 8, 4]
    dataset = PackedDataset(dataset_folder)
    cached = signal_source(RunContext(config), CPU)
    teacher = signal_source(RunContext(student(trained, dataset_folder, "views-live", teacher=live)), CPU)
    items = PageDataset(dataset, config.data.view, config.run.seed, config.views)
    batch = collate([items[SampleRef(epoch, sample)] for epoch, sample in ((0, 3), (1, 3), (3, 5))])
    first, second = cached.signals(batch), teacher.signals(batch)
    assert first is not None and second is not None
    assert torch.equal(first.boxes, second.boxes)
    torch.testing.assert_close(first.pooled[first.valid], second.pooled[second.valid], rtol=1e-4, atol=1e-5)


def test_a_changed_config_is_refused_with_the_difference(trained: Path, dataset_folder: Path) -> None:
    with pytest.raises(OutputError, match=r"schedule\.lr was 0\.001, is 0\.5"):
        train_run(RunContext(small(trained, dataset_folder, "teacher", schedule={"lr": 0.5})))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dsig"},
        {"name": "dsig", "nodes": "student"},
        {"name": "pkd"},
        {"name": "graphkd", "nodes": "student"},
    ],
)
def test_every_method_trains_on_the_same_pages(trained: Path, dataset_folder: Path, method: dict[str, Any]) -> None:
    signals = "live" if method["name"] == "pkd" or "nodes" in method else "cache"
    name = f"{method['name']}-{len(method)}"
    config = student(trained, dataset_folder, name, method=method, teacher={"signals": signals})
    train_run(RunContext(config))
    lines = read_metrics(config.folder)
    assert len(lines) == 4 and all(math.isfinite(value) for line in lines for value in line["terms"].values())
    assert any(name.startswith("kd_") for name in lines[-1]["terms"])


def test_a_run_starts_from_another_runs_weights(trained: Path, dataset_folder: Path) -> None:
    teacher = small(trained, dataset_folder, "teacher")
    config = small(trained, dataset_folder, "tuned", run={"init": str(teacher.folder)}, schedule={"lr": 1e-9})
    train_run(RunContext(config))
    first, second = weights(teacher), weights(config)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    orphan = small(trained, dataset_folder, "orphan", run={"init": str(trained / "nowhere")})
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        train_run(RunContext(orphan))


def test_a_run_of_another_backbone_is_no_start(trained: Path, dataset_folder: Path) -> None:
    changed = {**SMALL_DETECTOR, "backbone": "mobilenetv3_small_100"}
    init = {"init": str(trained / "teacher")}
    with pytest.raises(CheckpointError, match=r"only \d+ of the detector's \d+ tensors fit"):
        train_run(RunContext(small(trained, dataset_folder, "other-start", run=init, detector=changed)))


def test_a_dataset_without_text_classes_is_refused_naming_them(
    coco_folder: Path, trained: Path, tmp_path: Path
) -> None:
    from pipeline.data.prepare.pack import pack

    packed = tmp_path / "packed"
    pack(coco_folder / "annotations.json", coco_folder / "images", packed, text=[])
    config = student(trained, packed, "no-text")
    with pytest.raises(ConfigError, match=r"none of the categories of .*\(Text, Picture, Title\) is flagged as text"):
        train_run(RunContext(config))


def test_what_is_missing_is_named_before_anything_is_written(
    trained: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is no run"):
        train_run(RunContext(student(tmp_path, dataset_folder, "orphan")))
    with pytest.raises(ConfigError, match="has 3 classes"):
        train_run(RunContext(small(tmp_path, dataset_folder, "classes", data={"num_classes": 5})))
    with pytest.raises(ConfigError, match=r"the same data\.view\.canvas"):
        canvas = {"view": {"canvas": [160, 96], "shortest_edge": [80, 96]}}
        train_run(
            RunContext(
                student(tmp_path, dataset_folder, "canvas", data=canvas, teacher={"run": str(trained / "teacher")})
            )
        )
    assert list(tmp_path.iterdir()) == []


def test_a_nonfinite_loss_stops_before_the_step(trained: Path, dataset_folder: Path) -> None:
    config = small(trained, dataset_folder, "explodes", schedule={"optimizer": "sgd", "lr": 1e12, "steps": 6})
    with pytest.raises(TrainingError, match=r"step \d: gradients are not finite \("):
        train_run(RunContext(config))


def test_a_smoke_run_learns_its_page_and_writes_nothing(trained: Path, dataset_folder: Path) -> None:
    config = student(trained, dataset_folder, "smoke")
    history = smoke(RunContext(config))
    assert len(history) == 10
    assert history[-1] < history[0]
    assert not config.folder.exists()


@pytest.mark.ray
def test_two_ray_workers_give_the_losses_of_one_process(trained: Path, dataset_folder: Path) -> None:
    # Small plain steps: at random weights, large ones let rounding grow a hundredfold from one step to the next.
    plain = {"optimizer": "sgd", "lr": 1e-5}
    one = student(trained, dataset_folder, "one-process", schedule=plain)
    two = student(
        trained, dataset_folder, "two-workers", schedule=plain, engine={"name": "ray", "workers": 2, "threads": 1}
    )
    train_run(RunContext(one))
    train_run(RunContext(two))
    # Rounding can exchange two proposals of equal score, and with them a sampled region.
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(one)[3] != pytest.approx(losses(one)[0], rel=1e-3)  # other pages, other weights
    assert len(losses(two)) == 4


def test_the_global_mean_weighs_ranks_by_their_pages() -> None:
    terms = {"a": torch.tensor([1.0, 2.0, 6.0])}
    whole = float(global_mean(terms, 3, World()))
    parts = [{"a": terms["a"][:2]}, {"a": terms["a"][2:]}]
    averaged = sum(float(global_mean(part, 3, World(rank=rank, size=2))) for rank, part in enumerate(parts)) / 2
    assert averaged == pytest.approx(whole) == 3.0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0]), ("multistep", [0.5, 1.0, 0.1, 0.1]), ("cosine", [0.5, 0.8536, 0.5, 0.1464])],
)
def test_learning_rates_by_hand(policy: str, expected: list[float]) -> None:
    schedule = ScheduleConfig(steps=4, lr=1.0, policy=policy, milestones=(2,), warmup_steps=2)
    assert [learning_rate(schedule, step) for step in range(4)] == pytest.approx(expected, abs=1e-4)


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    schedule = ScheduleConfig(steps=100, lr=1.0, policy="one_cycle")
    rates = [learning_rate(schedule, step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) == 25
    assert rates[-1] == pytest.approx(1e-4)


def test_a_teacher_without_region_head_needs_another_categorizer(dataset_folder: Path, tmp_path: Path) -> None:
    train_run(
        RunContext(
            small(tmp_path, dataset_folder, "teacher", detector={"architecture": "retinanet"}, schedule={"steps": 1})
        )
    )
    with pytest.raises(ConfigError, match=r"teacher is a retinanet; set method\.graph\.categorizer=moments"):
        train_run(RunContext(student(tmp_path, dataset_folder, "wants-classes", teacher={"signals": "live"})))


def test_heads_made_for_other_anchors_are_not_inherited(trained: Path, dataset_folder: Path) -> None:
    changed = {**SMALL_DETECTOR, "anchor_sizes": [9, 18, 36, 72, 144]}
    teacher = weights(small(trained, dataset_folder, "teacher"))
    head = "detector.model.rpn.head.cls_logits.weight"
    same = build_training_step(RunContext(student(trained, dataset_folder, "anchors")), CPU)
    assert torch.equal(same.state_dict()[head], teacher[head])
    other = student(trained, dataset_folder, "anchors", detector=changed)
    assert not torch.equal(build_training_step(RunContext(other), CPU).state_dict()[head], teacher[head])
    asked = student(trained, dataset_folder, "anchors", detector=changed, method={"name": "graphkd", "inherit": True})
    with pytest.raises(ConfigError, match=r"the student has anchors \(9\.0, .* and the teacher \(8\.0"):
        build_training_step(RunContext(asked), CPU)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ({"backbone": "resnet_of_nowhere"}, "cannot be built by timm"),
        ({"weights": "nowhere.safetensors"}, "do not exist"),
        ({"weights": "package"}, "no package has weights of 'resnet18'"),
    ],
)
def test_a_refused_start_leaves_nothing_and_binds_nothing(
    detector: dict[str, Any], message: str, dataset_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_run(RunContext(small(tmp_path, dataset_folder, "run", detector={**SMALL_DETECTOR, **detector})))
    assert not (tmp_path / "run").exists()
    open_run_folder(small(tmp_path, dataset_folder, "run", schedule={"lr": 0.5}))  # a start that failed later
    train_run(RunContext(small(tmp_path, dataset_folder, "run")))


def test_training_starts_not_anew_where_no_checkpoint_can_be_used(dataset_folder: Path, tmp_path: Path) -> None:
    config = small(tmp_path, dataset_folder, "run")
    train_run(RunContext(config))
    for path in (config.folder / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"damaged")
    before = (config.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in"):
        train_run(RunContext(config))
    assert (config.folder / "metrics.jsonl").read_bytes() == before


def test_pages_without_any_target_are_refused(dataset_folder: Path, tmp_path: Path) -> None:
    """Packing refuses them too, so that only tars of other tools hold them."""
    from pipeline.data.prepare.index_external import index_dataset

    folder = Path(shutil.copytree(dataset_folder, tmp_path / "data"))
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        with tarfile.open(shard, "w") as tar:
            for name, content in files.items():
                if name.endswith(".json"):
                    sample = json.loads(content)
                    content = json.dumps({**sample, "iscrowd": [1] * len(sample["boxes"])}).encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_dataset(folder)
    with pytest.raises(DataError, match=r"none of the \d+ regions of .* is a target: all are crowd"):
        train_run(RunContext(small(tmp_path, folder, "run", data={"val": None})))
