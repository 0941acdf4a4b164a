"""The settings of a run that a command line gives: in a file, by options, and by --set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zskt.cli.options import options
from zskt.errors import UsageError
from zskt.files import read_text
from zskt.method.budget import BUDGETED
from zskt.method.build import METHODS
from zskt.method.config import FORMAT, Config
from zskt.method.protocol import Make
from zskt.method.recipe import AUTO, custom_method, describe_method, load_recipe
from zskt.settings import changes_of, from_text, replace

SHORTCUTS = {"device": "machine.device", "threads": "machine.threads", "precision": "machine.precision"}
if TYPE_CHECKING:
    Overrides = Any
else:
    Overrides = options(Config, "from the recipe", leave_out={"format", "recipe", "method"}, shortcuts=SHORTCUTS)
    """Every setting of a run as a tyro option."""
AS_THE_RECIPE_SAYS = Overrides()


def read_settings(
    recipe: str | None,
    config: Path | None,
    assignments: Sequence[str],
    given: dict[str, Any],
    make: Make | None,
) -> tuple[str, dict[str, Any]]:
    """The recipe and its changes: those of a TOML file, overridden by options and `--set`.

    Raises UsageError for a file of another recipe or method than those given.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, value = from_text(assignment)
        name = SHORTCUTS.get(name, name)
        if name in ("recipe", "method", "format"):
            raise UsageError(f"--set {name}: use --{'recipe' if name == 'format' else name}")
        if name in given or name in changes:
            raise UsageError(f"{name} is given twice; give it once")
        changes[name] = value
    typed_sizes = given | changes
    if "budget" in typed_sizes and (both := [name for name in BUDGETED if name in typed_sizes]):
        raise UsageError(f"--budget chooses {both[0]}: give one of them")
    if config is None:
        return recipe or AUTO, given | changes
    file = changes_of(read_text(config), str(config))
    replace(Config(), {"format": file.pop("format", FORMAT)})  # another one is refused
    base, method = file.pop("recipe", recipe or AUTO), file.pop("method", None)
    if method is not None and method not in METHODS:
        if make is None:
            raise custom_method(method)
        if (found := describe_method(make)) != method:
            raise UsageError(f"expected the method of {config}, {method}, found {found}; give the same one")
    if make is not None:  # which uses the file's values, whatever recipe they started from
        base = recipe or AUTO
    elif recipe not in (None, base):
        raise UsageError(f"recipe {base} of {config} and --recipe {recipe}: give one of them")
    elif method not in (None, "belief_matching") and (base == AUTO or load_recipe(str(base)).method != method):
        raise UsageError(f"method {method} of {config} is not that of recipe {base}: set recipe to one that has it")
    if "budget" in typed_sizes:
        file = {name: value for name, value in file.items() if name not in BUDGETED}
    return str(base), file | given | changes
