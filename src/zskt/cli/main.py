"""The command line: one subcommand is one library call.

The last line on stdout is one JSON object; everything else goes to stderr, with --quiet only warnings and errors. Exit
status: 0 done, 1 the work failed, 2 bad usage, 130 or 143 interrupted with a checkpoint written. zskt --version prints
the version, zskt --tyro-print-completion bash (zsh, tcsh) a script that completes commands and options.
"""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from zskt.bench import step_time as bench
from zskt.bench.roofline import PHASES
from zskt.cli import demo
from zskt.cli.export import run_export
from zskt.cli.given import SHORTCUTS
from zskt.cli.inspect import run_inspect
from zskt.cli.options import File
from zskt.cli.paper import run_belief, run_reproduce
from zskt.cli.progress import bar, console, notice, silence
from zskt.cli.runs import run_distill, run_evaluate, run_images, run_report, run_sample
from zskt.cli.sweep import run_sweep
from zskt.cli.teachers import Result, run_import, run_teach
from zskt.errors import UsageError, ZsktError, cannot, first_line, out_of_memory, short, to_stderr
from zskt.method.config import Config
from zskt.method.recipe import AUTO, load_recipe, recipe_texts
from zskt.networks import ranks
from zskt.run.checkpoint import Interrupted
from zskt.runtime import __version__
from zskt.settings import flat, to_toml

# The subcommands. Their docstrings are the help texts.


def run_demo(*, recipe: str = demo.RECIPE, seed: int = 0, out: File = None) -> Result:
    """Everything in a minute: train a teacher on handwritten digits, drop the data, distil, measure.

    Example: zskt demo --recipe bank --seed 1

    Args:
        recipe: a name from `zskt recipes`, or auto.
        seed: for both networks, the generator and the latents; the split of the data is fixed.
        out: output folder; by default runs/demo-1, runs/demo-2, ...
    """
    started = time.monotonic()
    result = demo.run(recipe, seed=seed, out=out)
    return result | {"seconds": round(time.monotonic() - started, 1)}


def run_bench(*, pair: str = "wrn", device: str = "auto", rounds: int = 5, explain: bool = False) -> Result:
    """Time one step on this machine, in fp32 and bf16, against the authors' released code.

    Example: zskt bench --pair digits

    Args:
        pair: wrn (WRN-40-2 -> WRN-16-1, 3 x 32 x 32), resnet, lenet, digits or large (224 x 224).
        device: auto, cpu, cuda or cuda:N.
        rounds: interleaved timings of each; the median is reported.
        explain: instead, compare each phase with the least time its operations and memory traffic could take on this
            machine (a roofline, from matrix product and copy timed in the same run).
    """
    if explain:
        return run_explain(pair, device, rounds)
    with bar("timing", "steps") as show:
        result = bench.run(pair, device, rounds=rounds, report=show)
    table = Table("", "reference", "fp32", "bf16", title=f"one step of {bench.describe(pair)}")
    for label, key, form in (
        ("seconds", "seconds_{}", "{:.3f}"),
        ("speedup", "speedup_{}", "{:.2f}"),
        ("peak MiB", "peak_mib_{}", "{:.0f}"),
    ):
        values = (result.get(key.format(arm)) for arm in bench.ARMS)
        missing = "1" if label == "speedup" else "-"  # of the reference itself; not measured on this system
        table.add_row(label, *(missing if value is None else form.format(value) for value in values))
    console().print(table)
    return result


def run_explain(pair: str, device: str, steps: int) -> Result:
    """`zskt bench --explain`."""
    result = bench.explain_pair(pair, device, steps=steps, report=notice)
    for arm in bench.ENGINE:
        found = result[arm]
        title = (
            f"{bench.describe(pair)}, {arm}; this machine: {found['operations_per_second'] / 1e9:,.0f} GFLOP/s, "
            f"{found['bytes_per_second'] / 1e9:,.1f} GB/s"
        )
        table = Table("phase", "GFLOP", "min GB", "min s", "measured s", "attained", title=title)
        for name, row in found["phases"].items():
            seconds = (f"{row[key]:.4f}" for key in ("seconds_at_best", "seconds"))
            table.add_row(
                PHASES.get(name, name),
                f"{row['operations'] / 1e9:,.1f}",
                f"{row['bytes'] / 1e9:.3f}",
                *seconds,
                f"{row['fraction']:.0%}",
            )
        console().print(table)
    return result


def run_recipes(name: tyro.conf.Positional[str | None] = None, /) -> Result:
    """List the recipes, or print every value of one.

    Example: zskt recipes zskt

    Args:
        name: the recipe to print.
    """
    texts = recipe_texts()
    if name is not None and name != AUTO:
        config = load_recipe(name)
        header = [line for line in texts[name].splitlines() if line.startswith("#")]
        for line in (*header, "", *to_toml(config).splitlines()):
            notice(line)
        return flat(config)
    summaries = {AUTO: "the default: bank if the teacher has BatchNorm, else bank-adversary"}
    summaries |= {recipe: text.splitlines()[0].removeprefix("# ") for recipe, text in texts.items()}
    table = Table("recipe", "description")
    for recipe, summary in summaries.items():
        table.add_row(recipe, summary)
    console().print(table)
    return summaries


COMMANDS: dict[str, Callable[..., Result | None]] = {
    "demo": run_demo,
    "teach": run_teach,
    "import": run_import,
    "inspect": run_inspect,
    "distill": run_distill,
    "sweep": run_sweep,
    "evaluate": run_evaluate,
    "belief": run_belief,
    "reproduce": run_reproduce,
    "sample": run_sample,
    "images": run_images,
    "report": run_report,
    "export": run_export,
    "recipes": run_recipes,
    "bench": run_bench,
}


RENAMED = {"shift": "random_crop", "mirrored": "horizontal_flip"}
RENAMED |= {old: new for old, new in Config.RENAMED.items() if old not in SHORTCUTS}
RENAMED |= {name: shortcut for shortcut, name in SHORTCUTS.items()}
"""Names of earlier versions and those that have a shortcut -> names of the options now."""


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of libraries as single lines, since they may quote what a file holds."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: to_stderr(f"{category.__name__}: {message}")
        yield


@plain_warnings()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        if os.environ.get("RANK", "0") == "0":
            print(f"zskt {__version__}")
        return 0
    with silence("--quiet" in arguments):
        command = [argument for argument in arguments if argument != "--quiet"]
        return _run_as_rank(command) if ranks.started() else _run(command)


SHARED = ("distill", "teach")
"""Commands that several processes can work on."""


def _run_as_rank(arguments: list[str]) -> int:
    """Run one subcommand as one of several processes: rank 0 speaks for all, or else the first one that fails."""
    try:
        with ranks.joined():
            if ranks.is_main():
                status = _run(arguments)
                if status:
                    ranks.reports_failure()
                return status
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                status = _run(arguments)
            if status and ranks.reports_failure():
                to_stderr(f"process {ranks.rank()}: {(said.getvalue().strip().splitlines() or ['it failed'])[-1]}")
            return status
    except ZsktError as error:
        to_stderr(f"zskt: {error}")
        return 1


def _run(arguments: list[str]) -> int:
    """Run one subcommand; every error becomes a line and an exit status."""
    try:
        if ranks.size() > 1 and arguments[:1] and arguments[0] not in SHARED:
            raise UsageError(f"{arguments[0]} is for one process, only {' and '.join(SHARED)} are for several")
        ranks.check_same({"the command": shlex.join(arguments)})
        arguments = [at_home(argument) for argument in arguments]
        for argument in arguments:
            if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in argument):
                raise UsageError(
                    f"argument {short(argument)!r} has control characters or is not UTF-8; rename what it stands for"
                )
        options = [argument.split("=")[0] for argument in arguments if re.match(r"--[a-z]", argument)]
        for option in options:
            if new := RENAMED.get(option.removeprefix("--").replace("-", "_")):
                raise UsageError(f"{option} is now --{new.replace('_', '-')}")
            if options.count(option) > 1:
                raise UsageError(f"{option} is given twice: give all its values at once, as in {option} A B")
        result = tyro.extras.subcommand_cli_from_dict(
            {name: _guarded(command) for name, command in COMMANDS.items()},
            prog="zskt",
            description=__doc__,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if result is not None:  # else the command has printed lines for another program
            print(json.dumps(result, allow_nan=False), flush=True)
    except Interrupted as error:
        to_stderr(f"zskt: {short(error, 2_000)}")
        print(json.dumps({"finished": False, "reason": short(error, 2_000)}), flush=True)
        return error.status
    except ZsktError as error:
        to_stderr(f"zskt: {short(error, 2_000)}")
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        to_stderr(f"zskt: {cannot('use', Path(str(error.filename or 'a file')), error)}")
        return 1
    except KeyboardInterrupt:
        to_stderr("zskt: interrupted")
        return 130
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        if ranks.lost(error):
            to_stderr("zskt: another process of this run has ended or does not answer; see why, then resume")
        elif out_of_memory(error):
            to_stderr("zskt: out of memory; use a smaller --batch-size, network or generator.width")
        elif os.environ.get("ZSKT_TRACEBACK"):
            raise
        else:
            to_stderr(
                f"zskt: unexpected {what}; please report it with the command (ZSKT_TRACEBACK=1 prints the traceback)"
            )
        return 1
    return 0


def at_home(argument: str) -> str:
    """The argument with a `~` that the shell has left, as in --out=~/runs, or that no shell has seen."""
    option, path = re.fullmatch(r"((?:--[a-z][\w.-]*=)?)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
    return option + os.path.expanduser(path) if path == "~" or path.startswith("~/") else argument


def _guarded(command: Callable[..., Result | None]) -> Callable[..., Result | None]:
    """The command, with a sys.exit in the code of a user's network turned into an error."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Result | None:
        try:
            return command(*arguments, **options)
        except SystemExit as error:
            raise ZsktError(f"the network's code calls sys.exit({error.code!r}); remove that call") from error

    return call
