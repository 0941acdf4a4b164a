"""zskt: distil a trained network into a smaller one without any data.

teacher = zskt.load_teacher("teacher/")
student = zskt.models.wide_resnet(16, 1, num_classes=10)
result = zskt.distill(teacher, student, steps=2_000, seed=0, out="runs/a")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zskt.api import *  # noqa: F403
    from zskt.api import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Load the public names, and torch, when the first of them is asked for.

        Loading takes seconds, in which a Ctrl-C shall end a command without a traceback: `__main__` sees to that, but
        this file runs before it.
        """
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(name)
        api = importlib.import_module("zskt.api")
        globals().update({public: getattr(api, public) for public in ("__all__", *api.__all__)})
        if name not in globals():  # the packages are there by now, too
            raise AttributeError(f"module 'zskt' has no attribute {name!r}")
        return globals()[name]
