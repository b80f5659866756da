from __future__ import annotations

import pytest

from pipeline.report.facts import commands, compare, details, differences, headline, role
from pipeline.report.runs import load_run
from pipeline.report.tables import accuracy_rows, class_rows, duration, training_rows


@pytest.fixture
def three(make_run):
    """Makes teacher, student alone and distilled student with the AP given."""

    def make(teacher: float, alone: float, distilled: float):
        big = {"architecture": "faster_rcnn", "backbone": "resnet50"}
        folders = [
            make_run("big", ap=teacher, detector=big),
            make_run("alone", ap=alone),
            make_run("distilled", ap=distilled, teacher="big"),
        ]
        return [load_run(folder) for folder in folders]

    return make


def test_roles(three):
    runs = three(0.7, 0.5, 0.6)
    assert [role(run, runs) for run in runs] == ["teacher", "trained alone", "distilled student"]


def test_a_gain_is_told_with_the_share_of_the_gap_it_closed(three):
    runs = three(0.7, 0.5, 0.55)
    assert headline(runs) == "Distillation gained 5.0 AP points: 55.0 with it, 50.0 without."
    assert "The teacher reaches 70.0 AP, so distillation closed 25 % of the gap of 20.0 points." in details(runs)
    assert "distilled is compared with alone, the same detector trained alone." in details(runs)


def test_a_loss_is_told_as_plainly(three):
    runs = three(0.7, 0.55, 0.5)
    assert headline(runs) == "Distillation cost 5.0 AP points: 50.0 with it, 55.0 without."
    assert "Here the student did better without its teacher." in details(runs)
    assert not any("closed" in sentence for sentence in details(runs))


def test_no_difference_is_no_win(three):
    assert headline(three(0.7, 0.5, 0.5002)).startswith("Distillation changed nothing")


def test_a_weak_teacher_is_named(three):
    assert any("no more than the student" in sentence for sentence in details(three(0.4, 0.5, 0.5)))


def test_the_run_alone_with_the_same_detector_is_compared(make_run):
    other = {"architecture": "faster_rcnn", "backbone": "resnet101"}
    runs = [
        load_run(make_run("other", ap=0.9, detector=other)),
        load_run(make_run("alone", ap=0.5)),
        load_run(make_run("distilled", ap=0.6, teacher="absent")),
    ]
    comparison = compare(runs)
    assert comparison.alone.label == "alone" and comparison.same_detector and comparison.teacher is None
    assert not compare([runs[0], runs[2]]).same_detector


def test_without_a_distilled_run_the_best_wins(make_run):
    first, second = load_run(make_run("first", ap=0.5)), load_run(make_run("second", ap=0.52))
    assert headline([first, second]) == "second wins with 52.0 AP, 2.0 points ahead of first."
    assert headline([first]) == "first reaches 50.0 AP."
    assert headline([first, load_run(make_run("third", ap=0.5))]) == "first and third are level at 50.0 AP."
    assert headline([load_run(make_run("young"))]) == "No run has been evaluated yet."


def test_unfair_comparisons_are_pointed_out(make_run):
    first = load_run(make_run("first", ap=0.5, data={"val": "a"}))
    second = load_run(make_run("second", ap=0.5, data={"val": "b"}))
    second.evaluation["step"] = 50
    assert any("different pages" in sentence for sentence in details([first, second]))
    assert any("different numbers of steps" in sentence for sentence in details([first, second]))
    assert not any("different" in sentence for sentence in details([first]))


def test_only_differing_keys_are_listed(make_run):
    first = make_run("first", schedule={"lr": 0.01, "steps": 5}, run={"folder": "x", "seed": 0})
    second = make_run("second", teacher="big", schedule={"lr": 0.02, "steps": 5}, run={"folder": "y", "seed": 0})
    rows = differences([load_run(first), load_run(second)])
    dash = "\N{EN DASH}"
    assert rows == {
        "method.name": ["none", "graphkd"],
        "schedule.lr": ["0.01", "0.02"],
        "teacher.run": [dash, "runs/big"],
    }


def test_commands_are_quoted_and_do_not_touch_the_old_run(make_run):
    lines = commands([load_run(make_run("first")), load_run(make_run("my run", run={"folder": "out/there"}))])
    assert lines[0].endswith("config.yaml name=first-again")
    assert "'name=my run-again' 'run.folder=out/my run-again'" in lines[1]
    assert lines[2].startswith("graphkd report ") and lines[2].endswith("my run'")


def test_accuracy_rows(three):
    runs = three(0.7, 0.5, 0.55)
    rows = {row.name: row for row in accuracy_rows(runs, compare(runs))}
    assert [cell.text for cell in rows["AP"].cells] == ["70.0", "50.0", "55.0"]
    assert [cell.best for cell in rows["AP"].cells] == [False, False, True]
    assert rows["AP"].gain_text == "+5.0"
    assert {cell.text for cell in rows["AP small"].cells} == {"\N{EN DASH}"} and rows["AP small"].gain is None


def test_class_rows(three):
    runs = three(0.7, 0.6, 0.5)
    rows = {row.name: row for row in class_rows(runs, compare(runs))}
    assert [cell.text for cell in rows["table"].cells] == ["35.0", "30.0", "25.0"]
    assert rows["table"].gain_text == "\N{MINUS SIGN}5.0"
    assert rows["figure"].gain_text == "\N{EN DASH}"


def test_training_rows(make_run):
    rows = {row.name: row.cells[0].text for row in training_rows([load_run(make_run("run", ap=0.5))])}
    assert rows == {
        "Steps": "100",
        "Parameters": "28.4 M",
        "Training time": "1 h 01 min",
        "Speed": "12",
        "Waiting for data": "25 %",
    }


def test_unknown_training_figures_are_left_out(make_run):
    folder = make_run("young")
    (folder / "metrics.jsonl").unlink()
    assert training_rows([load_run(folder)]) == []


def test_durations():
    assert [duration(seconds) for seconds in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]
