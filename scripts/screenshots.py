"""Screenshots of the built site at desktop and phone width, by Debian's Chromium.

python scripts/screenshots.py build/screenshots [PAGE...]    # after `make docs`; pages such as index docs/deploy
python scripts/screenshots.py build/screenshots runs/a/report.html index    # a report, too

Needs `pip install playwright` (without its browser) and /usr/bin/chromium. Fails if a page logs an error, asks for
anything but files, or is wider than the screen, and if the search finds nothing.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parent.parent / "build" / "site"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


def main(out: Path, pages: list[str]) -> int:
    """Write OUT/PAGE-WIDTH.png of each page and width; returns how many faults were found."""
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for width, (columns, rows) in WIDTHS.items():
            view = browser.new_page(viewport={"width": columns, "height": rows})
            view.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
            view.on(
                "request",
                lambda sent: None if sent.url.startswith(("file:", "data:", "blob:")) else faults.append(sent.url),
            )
            for page in pages:
                there = Path(page).resolve() if page.endswith(".html") else SITE / f"{page}.html"
                view.goto(there.as_uri())
                wide = view.evaluate("document.documentElement.scrollWidth")
                if wide > columns:
                    faults.append(f"{page} is {wide} pixels wide at {columns}")
                name = there.stem if page.endswith(".html") else page.replace("/", "-")
                view.screenshot(path=out / f"{name}-{width}.png")
        view.goto((SITE / "index.html").as_uri())
        view.locator("label[for=__search]").first.click()
        view.locator("input.md-search__input").press_sequentially("collapse")
        view.locator(".md-search-result__item").first.wait_for(timeout=10_000)
        view.screenshot(path=out / "search-phone.png")
        browser.close()
    print("\n".join(faults) or "no faults", file=sys.stderr)
    return len(faults)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    every = sorted(str(path.relative_to(SITE).with_suffix("")) for path in SITE.rglob("*.html") if path.stem != "404")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or every) > 0)
