"""Looks at a page of `micromix report` in a headless Chromium: screenshots of it, and what it must not do.

    pip install playwright
    python bench/report_screenshots.py report.html FOLDER --source r.safetensors [--chromium PATH]

Writes desktop and phone, light and dark, and a PDF as it prints. Ends with an error if the page asks for anything, says
anything on the console, is wider than the screen, has text that is hard to tell from what is behind it, or shows other
numbers than the recipe or the packed checkpoint of which it is.
"""

from __future__ import annotations

import argparse
import shutil
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.report.facts import read
from micromix_compile.report.page import number, size

if TYPE_CHECKING:
    from micromix_compile.report.facts import Facts

WIDTHS: Final = {"desktop": 1280, "phone": 390}
PAPER: Final = 1047
"""Pixels across A4, turned, between margins of 10 mm."""
SCHEMES: Final = ("light", "dark")
CHROMIUMS: Final = ("chromium-headless-shell", "chromium", "google-chrome")
LEAST_CONTRAST: Final = 4.5
"""Of text, by WCAG 2.1, level AA."""

CONTRASTS: Final = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return numbers(getComputedStyle(document.body).backgroundColor);
  };
  return [...document.querySelectorAll('p, td, th, h1, h2, h3, figcaption, span, b, code, text')].map(element => {
    const style = getComputedStyle(element);
    const front = luminance(numbers(element.tagName === 'text' ? style.fill : style.color));
    const back = luminance(behind(element));
    const ratio = (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
    return [ratio, element.textContent.trim().slice(0, 40)];
  }).sort((a, b) => a[0] - b[0]).slice(0, 1);
}"""


def look(browser: Any, page_file: Path, folder: Path, name: str, scheme: str, facts: Facts) -> list[str]:
    """Takes one screenshot. Returns what is wrong."""
    context = browser.new_context(
        viewport={"width": WIDTHS[name], "height": 844}, color_scheme=scheme, device_scale_factor=1.5
    )
    page, wrong = context.new_page(), []
    url = page_file.resolve().as_uri()
    page.on("request", lambda request: request.url == url or wrong.append(f"asks for {request.url[:80]}"))
    page.on("console", lambda message: wrong.append(f"says {message.text}"))
    page.goto(url)
    wrong += _too_wide(page, WIDTHS[name])
    ratio, text = page.evaluate(CONTRASTS)[0]
    if ratio < LEAST_CONTRAST:
        wrong.append(f"has a contrast of {ratio:.1f} at {text!r}, less than {LEAST_CONTRAST}")
    shown = page.evaluate(NUMBERS)
    wrong += [
        f"shows {shown.get(key)} for {key}, not {text}" for key, text in texts(facts).items() if shown.get(key) != text
    ]
    page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=True)
    if (name, scheme) == ("desktop", "light"):
        page.pdf(path=folder / "print.pdf", prefer_css_page_size=True, print_background=True)
        page.emulate_media(media="print")
        page.set_viewport_size({"width": PAPER, "height": 844})
        wrong += _too_wide(page, PAPER)
    context.close()
    return [f"{name}, {scheme}: the page {fact}" for fact in wrong]


def texts(facts: Facts) -> dict[str, str]:
    """What must be read on the page, by the names of its elements; of linears by theirs."""
    known = {
        "linears": str(len(facts.linears)),
        **({} if facts.element_bits is None else {"element-bits": number(facts.element_bits)}),
        "stored-bits": number(facts.stored_bits),
        "stored-bytes": size(facts.stored_bytes),
        **{f"bytes-{part}": size(count) for part, count in facts.bytes_by_part.items()},
    }
    linears = {
        linear.fqn: [*map(str, (*linear.split, linear.in_features, linear.out_features)), number(linear.element_bits)]
        for linear in facts.linears
    }
    return known | {fqn: " ".join(values) for fqn, values in linears.items()}


def _too_wide(page: Any, width: int) -> list[str]:
    found = page.evaluate("document.documentElement.scrollWidth")
    return [f"is {found} pixels wide where there are {width}"] if found > width else []


NUMBERS: Final = """() => Object.fromEntries([
  ...[...document.querySelectorAll('data[id]')].map(e => [e.id, e.innerText]),
  ...[...document.querySelectorAll('tr[data-fqn]')].map(
    row => [row.dataset.fqn, [...row.querySelectorAll('data')].slice(0, 6).map(e => e.innerText).join(' ')]),
])"""


def main() -> None:
    """All sizes and schemes."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="what the page is of")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, CHROMIUMS)), None))
    arguments = parser.parse_args()
    if arguments.chromium is None:
        raise SystemExit(f"--chromium must be the path of a browser: none of {', '.join(CHROMIUMS)} was found")
    facts = read(arguments.source)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        wrong = [
            fact
            for name, scheme in product(WIDTHS, SCHEMES)
            for fact in look(browser, arguments.page, arguments.folder, name, scheme, facts)
        ]
        browser.close()
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
