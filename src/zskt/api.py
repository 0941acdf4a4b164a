"""The public names: `zskt` has these and no others."""

from zskt.deploy.export import Exported, export
from zskt.errors import UsageError, ZsktError
from zskt.evaluate.fidelity import Comparison, compare, fidelity
from zskt.evaluate.transitions import Paths
from zskt.method import losses
from zskt.method.build import belief_matching
from zskt.method.config import Config
from zskt.method.generator import Generator
from zskt.method.matching import BeliefMatching, Latent
from zskt.method.protocol import Make, Method
from zskt.method.recipe import load_recipe
from zskt.method.replay import Fresh, ReplayBuffer, Same
from zskt.method.updates import Batch, Beliefs, Losses, Updates, by_name
from zskt.networks import models, ranks
from zskt.networks.classifier import Classifier
from zskt.networks.folder import load_student, save_teacher
from zskt.networks.loading import load_teacher
from zskt.networks.observe import Observation, Observer
from zskt.networks.students import make_student
from zskt.run.distill import DistillResult, distill
from zskt.run.lifecycle import Event
from zskt.run.report import write_report
from zskt.runtime import __version__

__all__ = [
    "Batch",
    "BeliefMatching",
    "Beliefs",
    "Classifier",
    "Comparison",
    "Config",
    "DistillResult",
    "Event",
    "Exported",
    "Fresh",
    "Generator",
    "Latent",
    "Losses",
    "Make",
    "Method",
    "Observation",
    "Observer",
    "Paths",
    "ReplayBuffer",
    "Same",
    "Updates",
    "UsageError",
    "ZsktError",
    "__version__",
    "belief_matching",
    "by_name",
    "compare",
    "distill",
    "export",
    "fidelity",
    "load_recipe",
    "load_student",
    "load_teacher",
    "losses",
    "make_student",
    "models",
    "ranks",
    "save_teacher",
    "write_report",
]
