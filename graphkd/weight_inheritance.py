"""Starting a student from the parts of its teacher that fit it."""

from __future__ import annotations

from graphkd.detectors import DetectorModule
from graphkd.detectors.detectron2.names import convert_framework
from graphkd.errors import ConfigError
from graphkd.method.config import MethodConfig


def inherit(student: DetectorModule, teacher: DetectorModule, method: MethodConfig) -> list[str]:
    """Start the student's heads and pyramid outputs from the teacher's, if all of them fit; gives the names taken over.

    Imitated features can be read by the head that they were made for, so that a student need not learn its own from
    nothing (Kang et al., "Instance-Conditional Knowledge Distillation", NeurIPS 2021, call it inheriting). Heads of
    Faster R-CNN pass between frameworks; those of RetinaNet have no common names.

    Raises:
        ConfigError: where ``method.inherit`` is true and a part has another shape in the two, naming both.
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
