"""Collect the pages of the documentation in a folder that mkdocs builds the site from.

python scripts/pages.py build/pages    # `make docs` does this, then builds build/site

Starting at README.md and docs/, every file that a page links to comes along: Markdown and pictures as they are, code as
a page, a folder as a list of its pages. Two pages are completed from the code: docs/commands.md by the options of every
command, docs/api.md by the docstrings of the public names (mkdocstrings fills them in).
"""

import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path, PurePosixPath
from types import FunctionType, ModuleType

import tyro

import zskt
from zskt.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
CODE = {".py": "python", ".toml": "toml", ".cff": "yaml", ".yml": "yaml"}
"""Files that become pages: suffix -> language."""


def page_of(target: PurePosixPath) -> PurePosixPath:
    """Where in the site a file or folder of the repository is."""
    path = ROOT / target
    if path.is_dir():
        return target / "index.md"
    return target.with_name(target.name + ".md") if target.suffix in {*CODE, ".ipynb"} or not target.suffix else target


def page(target: PurePosixPath) -> str:
    """The Markdown of a file or folder of the repository."""
    path = ROOT / target
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in {".md", ".ipynb", *CODE})
        return f"# {target}\n\n" + "".join(f"- [{name}]({name})\n" for name in files)
    text = path.read_text(encoding="utf-8")
    if target.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for source, kind in cells)
    if target.suffix != ".md":
        return f"# {target.name}\n\n`{target}`\n\n````{CODE.get(target.suffix, 'text')}\n{text}````\n"
    if str(target) == "docs/commands.md":
        return text + "".join(command(name) for name in COMMANDS)
    if str(target) == "docs/api.md":
        return text + "".join(f"\n::: {place}\n" for name in zskt.__all__ if (place := defined(getattr(zskt, name))))
    return text


def defined(thing: object) -> str:
    """Where a public name comes from, as mkdocstrings finds it; nothing for a constant or an alias."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    return f"{thing.__module__}.{thing.__qualname__}" if isinstance(thing, type | FunctionType) else ""


def command(name: str) -> str:
    """The help of one subcommand, its options as tables."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no other function of tyro gives the options one by one
        config = (tyro.conf.FlagCreatePairsOff,)
        parser = tyro.extras.get_parser(COMMANDS[name], prog=f"zskt {name}", config=config)
    paragraphs = [" ".join(text.split()) for text in (parser.description or "").strip().split("\n\n")]
    lines = ["", f"## zskt {name}", ""]
    for text in paragraphs:
        lines += ["```sh", text.removeprefix("Example: "), "```", ""] if text.startswith("Example: ") else [text, ""]
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.dest != "help":
                usage = " ".join(filter(None, [*action.option_strings, str(action.metavar or "")]))
                rows.append(
                    f"| `{usage}` | {escaped(action.help or '')} |".replace("{True,False}|auto", "True, False, auto")
                )
        if rows:
            title = (group.title or "").removesuffix(" options")
            lines += [f"| {title} | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Help text in a cell of a table: one line, Markdown's characters escaped outside of code."""
    parts = " ".join(text.replace("%%", "%").split()).split("`")
    parts[::2] = [re.sub(r"([\[\]*_<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def write(start: list[PurePosixPath], out: Path) -> int:
    """Write the pages `start` and all that they lead to; returns how many files there are."""
    shutil.rmtree(out, ignore_errors=True)
    waiting, seen = list(start), set(start)
    while waiting:
        target = waiting.pop()
        place = out / page_of(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        if page_of(target).suffix != ".md":
            shutil.copyfile(ROOT / target, place)
            continue
        folder = target if (ROOT / target).is_dir() else target.parent

        def link(found: re.Match[str], folder: PurePosixPath = folder, here: PurePosixPath = target) -> str:
            if "://" in found[2] or found[2].startswith("mailto:"):
                return found[0]
            to = PurePosixPath(os.path.normpath(folder / found[2]))
            if not (ROOT / to).exists():
                sys.exit(f"{here}: the link {found[2]} leads nowhere")
            if to not in seen:
                seen.add(to)
                waiting.append(to)
            return found[1] + os.path.relpath(page_of(to), page_of(here).parent) + found[3]

        text = page(target)
        place.write_text(text if target.suffix in CODE else LINK.sub(link, text), encoding="utf-8")
    for name in ("iframe-worker.js", "site.css"):
        shutil.copyfile(ROOT / "scripts" / name, out / name)
    return len(seen)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    documents = [PurePosixPath(f"docs/{path.name}") for path in sorted((ROOT / "docs").glob("*.md"))]
    print(f"{write([PurePosixPath('README.md'), *documents], Path(sys.argv[1]))} files", file=sys.stderr)
