"""Warnings that a run has gone wrong, from pseudo images alone."""

from typing import Any


def pseudo_image_warnings(beliefs: dict[str, Any]) -> list[str]:
    """Warnings from what `pseudo_beliefs` returns; none of them estimates the accuracy."""
    classes = len(beliefs["class_counts"])
    seen = sum(count > 0 for count in beliefs["class_counts"])
    found = []
    if beliefs["class_entropy"] < 0.5:
        found.append(
            f"collapse: the teacher predicts {seen} of {classes} classes on the pseudo images, most of them in very few"
        )
    if beliefs["teacher_confidence"] < 1.5 / classes:
        found.append("the teacher recognises nothing in the pseudo images: its confidence is close to chance")
    if beliefs["pseudo_agreement"] < 0.5:
        found.append("the student disagrees with the teacher on most pseudo images: try more steps or a larger student")
    return found
