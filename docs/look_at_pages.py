"""Look at the built handbook in a browser without a network: is every formula drawn, and nothing cut off?

    make docs && python docs/look_at_pages.py

Each page is opened at the width of a desktop and of a phone, and four things are asked of it: that it asks no network for
anything, that every formula has been drawn, that every picture has been found, and that nothing sticks out sideways but what
can be scrolled to. Needs Chromium (Debian's does) and `pip install playwright`, which brings no browser of its own here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

BUILT = Path(__file__).parent / "_build" / "html"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

LOOK = """
() => {
  const scrolls = (one) => {
    for (let at = one; at; at = at.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(at).overflowX) && at !== document.documentElement) return true;
    return false;
  };
  const seen = (one) => { const box = one.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const main = document.querySelector("article") || document.body;
  const wide = [...main.querySelectorAll("*")].filter(
    (one) => seen(one) && one.getBoundingClientRect().right > innerWidth + 1 && !scrolls(one));
  return {
    formulas: document.querySelectorAll(".math").length,
    drawn: [...document.querySelectorAll(".math")].filter((one) => one.querySelector("mjx-container, svg, .katex")).length,
    missing: [...document.images].filter((one) => !one.complete || !one.naturalWidth).map((one) => one.src),
    clipped: [...main.querySelectorAll("*")].filter(
      // What MathJax writes for screen readers is hidden on purpose.
      (one) => seen(one) && !one.closest("mjx-assistive-mml") &&
        getComputedStyle(one).overflowX === "hidden" && one.scrollWidth > one.clientWidth + 1
    ).slice(0, 3).map((one) => `${one.tagName} ${one.textContent.trim().slice(0, 60)}`),
    wide: wide.slice(0, 3).map((one) => `${one.tagName} ${one.textContent.trim().slice(0, 60)}`),
  };
}
"""


def complaints(page: Any, path: Path, asked: list[str]) -> Iterator[str]:
    """Open a page, and say what is wrong with it."""
    asked.clear()
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_function("() => !window.MathJax || !MathJax.startup || MathJax.startup.promise", timeout=30_000)
    if page.query_selector(".math"):
        page.evaluate("async () => { if (window.MathJax && MathJax.startup) await MathJax.startup.promise; }")
    found = page.evaluate(LOOK)
    if found["drawn"] < found["formulas"]:
        yield f"{found['formulas'] - found['drawn']} of {found['formulas']} formulas are not drawn"
    yield from (f"no picture {source}" for source in found["missing"])
    yield from (f"cut off: {what}" for what in found["wide"] + found["clipped"])
    yield from (f"asks the network for {address}" for address in asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, default=BUILT)
    parser.add_argument("--pictures", type=Path, help="where to keep a picture of each page")
    args = parser.parse_args()
    pages = sorted(path for path in args.built.rglob("*.html") if not {"_static", "_modules", "_sources"} & set(path.parts))
    if not pages:
        parser.error(f"{args.built} has no pages; run `make docs` first")
    wrong, asked = 0, []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, height) in WIDTHS.items():
            context = browser.new_context(viewport=dict(width=width, height=height), offline=True)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
            for path in pages:
                for complaint in complaints(page, path, asked):
                    wrong += 1
                    print(f"{path.relative_to(args.built)}, {name}: {complaint}")
                if args.pictures:
                    args.pictures.mkdir(parents=True, exist_ok=True)
                    place = ".".join(path.relative_to(args.built).with_suffix("").parts)
                    page.screenshot(path=args.pictures / f"{place}-{name}.png", full_page=True)
        browser.close()
    print(f"{len(pages)} pages at {len(WIDTHS)} widths: {wrong or 'no'} complaint{'s' if wrong != 1 else ''}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
