"""zskt: distil a trained network into a smaller one without any data.

teacher = zskt.load_teacher("teacher/")
student = zskt.models.wide_resnet(16, 1, num_classes=10)
result = zskt.distill(teacher, student, steps=2_000, seed=0, out="runs/a")
"""

from zskt import losses, models
from zskt.distill import DistillResult, Event, distill
from zskt.export import Exported, export
from zskt.files import UsageError, ZsktError
from zskt.generator import Generator
from zskt.loading import load_teacher
from zskt.matching import BeliefMatching, Beliefs, Latent, StepLosses, Updates
from zskt.memory import Bank, Fresh, Same
from zskt.report import write_report
from zskt.students import make_student
from zskt.teacher import Teacher, load_student, save_teacher
from zskt.transitions import Comparison, compare
from zskt.version import __version__

__all__ = [
    "Bank",
    "BeliefMatching",
    "Beliefs",
    "Comparison",
    "DistillResult",
    "Event",
    "Exported",
    "Fresh",
    "Generator",
    "Latent",
    "Same",
    "StepLosses",
    "Teacher",
    "Updates",
    "UsageError",
    "ZsktError",
    "__version__",
    "compare",
    "distill",
    "export",
    "load_student",
    "load_teacher",
    "losses",
    "make_student",
    "models",
    "save_teacher",
    "write_report",
]
