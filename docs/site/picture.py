"""Take the picture of a report that the README and the first page show: `python docs/site/picture.py runs/quickstart`.

It needs Chromium and playwright (the extra `dev`). In: a finished run. Out: docs/images/report.png, the top of its report at twice the
pixels, in few colours so that it stays small.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parents[1] / "images" / "report.png"
COLOURS = 64
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=640)
    asked = parser.parse_args()
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": asked.width, "height": asked.height}, device_scale_factor=2)
        page.goto((asked.run / "report.html").resolve().as_uri())
        picture = Image.open(io.BytesIO(page.screenshot()))
        chromium.close()
    OUT.parent.mkdir(exist_ok=True)
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
