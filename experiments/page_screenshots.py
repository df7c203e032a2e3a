"""Pictures of the page of `align serve` for docs/serving.md, taken in Chromium.

Needs selenium, chromium and chromedriver, and a server with an index of scenes (docs/search.md):

    align serve --model runs/quickstart --index photos --name quickstart --port 8000
    python experiments/page_screenshots.py --url http://127.0.0.1:8000 --out docs/images
"""

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from align_jax.data.sources.open_source import open_source

_WIDE, _NARROW = (1000, 640), (400, 800)  # px
_LABELS = "red star\nblue star\nred triangle\ngreen circle\nyellow crescent"


def main() -> None:
    """Writes serve_*.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = _start(folder)
        try:
            _take_all(driver, args.url, args.out, Path(folder))
        finally:
            driver.quit()


def _take_all(driver: webdriver.Chrome, url: str, out: Path, folder: Path) -> None:
    record = open_source("scenes?size=300&seed=8")[5]
    own = folder / "own.png"
    Image.fromarray(record.image).save(own)
    row = "scene_7_112"  # a small red star
    shots = [
        ("text", {"text": "a red star"}, None, _WIDE, False),
        ("picture", {}, own, _WIDE, False),
        ("composed", {"row": row, "remove": "red", "add": "blue"}, None, _WIDE, True),
        ("classify", {"mode": "classify", "row": row, "labels": _LABELS}, None, _WIDE, False),
        ("narrow", {"text": "a red star"}, None, _NARROW, True),
    ]
    for name, state, file, (width, height), is_dark in shots:
        driver.get("about:blank")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(f"{url}/#{urlencode(state)}")
        if file:
            driver.find_element("id", "picture").send_keys(str(file))
            time.sleep(1)
            driver.find_element("id", "submit").click()
        time.sleep(3)
        driver.execute_script("scrollTo(0, 0)")
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        few = picture.quantize(256, Image.Quantize.FASTOCTREE)
        few.save(out / f"serve_{name}.png", optimize=True)


def _start(profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}/profile")
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


if __name__ == "__main__":
    main()
