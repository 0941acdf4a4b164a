"""Copy the output of `zskt reproduce` into results/, with date and prefix in its name.

python benchmarks/publish.py runs/mnist mnist figure-2 figure-4
"""

import argparse
import re
import shutil
from pathlib import Path

import record
from zskt.files import read_json, read_text, write_text


def main() -> None:
    """Copy JSON, Markdown and its images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --out of zskt reproduce")
    parser.add_argument("prefix", help="put before every name")
    parser.add_argument("names", nargs="+", help="table-1, toy, ...")
    arguments = parser.parse_args()
    for name in arguments.names:
        stem = f"{read_json(arguments.folder / f'{name}.json')['date']}-{arguments.prefix}-"
        page = read_text(arguments.folder / f"{name}.md")
        for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
            shutil.copy(arguments.folder / picture, record.RESULTS / f"{stem}{picture}")
            page = page.replace(f"({picture})", f"({stem}{picture})")
        write_text(record.RESULTS / f"{stem}{name}.md", page)
        shutil.copy(arguments.folder / f"{name}.json", record.RESULTS / f"{stem}{name}.json")


if __name__ == "__main__":
    main()
