from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.report.charts import RUN_COLOURS, class_bars, loss_curves, run_colour, smoothed
from pipeline.report.pages import CLASS_COLOURS
from pipeline.report.runs import class_names, load_run


def picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def colours(image: Image.Image) -> set[str]:
    return {"#{:02X}{:02X}{:02X}".format(*colour) for colour in np.unique(np.asarray(image).reshape(-1, 3), axis=0)}


def test_distillation_gets_a_panel_only_where_a_run_has_it(make_run):
    alone, distilled = load_run(make_run("alone")), load_run(make_run("distilled", teacher="big"))
    narrow, wide = picture(loss_curves([alone])), picture(loss_curves([alone, distilled]))
    assert wide.width == pytest.approx(1.5 * narrow.width, rel=0.02)


def test_each_run_is_drawn_in_its_colour(make_run):
    runs = [load_run(make_run(f"run{number}", ap=0.5)) for number in range(3)]
    for image in (picture(loss_curves(runs)), picture(class_bars(runs))):
        assert set(RUN_COLOURS[:3]) <= colours(image)
        assert RUN_COLOURS[3] not in colours(image)


def test_bars_keep_the_colour_of_a_run_behind_one_that_was_not_evaluated(make_run):
    runs = [load_run(make_run("young")), load_run(make_run("done", ap=0.5))]
    assert run_colour(1) in colours(picture(class_bars(runs)))
    assert run_colour(0) not in colours(picture(class_bars(runs)))


def test_curves_of_odd_logs(make_run):
    folder = make_run("o$dd$ _name")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n{"step": 3}\n')
    assert picture(loss_curves([load_run(folder)])).width > 500


def test_same_runs_give_the_same_bytes(make_run):
    runs = [load_run(make_run("run", ap=0.5))]
    assert loss_curves(runs) == loss_curves(runs)
    assert class_bars(runs) == class_bars(runs)


def test_classes_and_their_ap(make_run):
    run = load_run(make_run("run", ap=0.5))
    assert class_names([run]) == ["paragraph", "table", "figure"]
    assert run.class_points("table") == 25.0
    assert np.isnan(run.class_points("figure")) and np.isnan(run.class_points("unknown"))


def test_smoothing_has_no_bias_at_the_start_and_steps_over_gaps():
    np.testing.assert_allclose(smoothed(np.full(20, 3.0), 5), 3.0)
    np.testing.assert_allclose(smoothed(np.array([np.nan, 2.0, np.inf, 2.0]), 5), [np.nan, 2, 2, 2])
    noisy = np.random.default_rng(0).normal(size=200)
    assert smoothed(noisy, 10).std() < 0.5 * noisy.std()
    np.testing.assert_allclose(smoothed(noisy, 0.5), noisy)


def test_thirteen_classes_have_thirteen_colours():
    assert len(set(CLASS_COLOURS)) == len(CLASS_COLOURS) >= 13
