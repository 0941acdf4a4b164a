"""Signs that a run has gone wrong, from pseudo images alone."""

from typing import Any


def warning_lights(beliefs: dict[str, Any]) -> list[str]:
    """Signs, on pseudo images alone, that a run has gone wrong; none of them estimates the accuracy."""
    classes = len(beliefs["class_counts"])
    seen = sum(count > 0 for count in beliefs["class_counts"])
    lights = []
    if beliefs["class_spread"] < 0.5:
        lights.append(f"collapse: the teacher sees {seen} of {classes} classes in the pseudo images, most in very few")
    if beliefs["teacher_confidence"] < 1.5 / classes:
        lights.append("the teacher recognises nothing in the pseudo images: its confidence is near that of guessing")
    if beliefs["pseudo_agreement"] < 0.5:
        lights.append("the student disagrees with the teacher on most pseudo images: more steps or a larger student")
    return lights
