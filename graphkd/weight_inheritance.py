"""Initialising a student's heads from its teacher's."""

from __future__ import annotations

from graphkd.detectors import DetectorModule
from graphkd.detectors.detectron2.names import convert_framework
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig


def inherit(student: DetectorModule, teacher: DetectorModule, method: MethodConfig) -> list[str]:
    """Copy the teacher's heads and pyramid outputs into the student if all shapes match; return the names copied.

    A head that fits the imitated features saves the student learning one from scratch (the inheriting strategy of Kang
    et al., "Instance-Conditional Knowledge Distillation", NeurIPS 2021). Heads of Faster R-CNN convert between
    frameworks; those of RetinaNet do not.

    Raises:
        ConfigError: if ``method.inherit`` is true and the shapes of a tensor differ, naming both.
    """
    if not method.inherits:
        return []
    theirs, ours = teacher.inheritable_parameters(), student.inheritable_parameters()
    if teacher.spec.framework != student.spec.framework:
        theirs = convert_framework(student.spec.framework, ours, theirs)
    for name, values in theirs.items():
        if name in ours and ours[name].shape == values.shape:
            continue
        if method.inherit is None:
            return []
        own = tuple(ours[name].shape) if name in ours else "none"
        raise ConfigError(
            f"{name} is {tuple(values.shape)} in the teacher and {own} in the student; give both the same "
            "architecture, fpn_channels and head_width, or leave method.inherit out"
        )
    student.load_state_dict(theirs, strict=False)
    return list(theirs)
