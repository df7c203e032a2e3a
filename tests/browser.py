"""What tests in a browser share: a server process, Chromium, and the page by its names."""

import base64
import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
import tiny_hf
from helpers import align_command, environment, write_table
from PIL import Image

import align_jax
from align_jax.search import ingest

EVIL = "<img src=x onerror='window.pwned=1'></li><script>window.pwned = 1</script>"
RIGHT_TO_LEFT = "\u202e\u05d0\u05d1 red & <b>bold</b>"
LONG = "wordwithoutanyspace" * 530  # 10 kB
COLOURS = ("red", "green", "blue", "black", "white", "olive")

_needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium and chromedriver are not installed",
)


def browser_test(function):
    """Marks a test that needs a browser."""
    return pytest.mark.slow(_needs_browser(function))


def start_server(model, index, folder, *arguments):
    """Returns a process of `align serve` that is ready, and its address."""
    options = ["--index", index] if index else []
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(
        align_command(
            "serve", "--model", model, "--port", 0, "--batch-size", 4, *options, *arguments
        ),
        cwd=folder,
        env=environment(folder / "cache"),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    log.close()
    address = process.stdout.readline().split()[-1:]
    if not address or not process.stdout.readline().startswith("ready"):
        process.kill()
        raise AssertionError((folder / "server.log").read_text())
    return process, address[0]


def make_world(folder):
    """Writes a tiny model, an index of pictures and captions, and files to ask with."""
    (folder / "model").mkdir()
    tiny_hf.make_folder(folder / "model")
    (folder / "images" / "sub dir").mkdir(parents=True)
    rng, table, columns = np.random.default_rng(0), [], {}
    extra = {0: EVIL, 1: RIGHT_TO_LEFT, 2: LONG}
    for number in range(30):
        colour = COLOURS[number % len(COLOURS)]
        picture = Image.new("RGB", (60, 50), colour)
        noise = rng.integers(0, 90, (20, 30, 3), np.uint8)
        picture.paste(Image.fromarray(noise), (int(rng.integers(30)), int(rng.integers(30))))
        name = "sub dir/ü #8? 100%.png" if number == 8 else f"{number}.png"
        picture.save(folder / "images" / name)
        caption = extra.get(number, f"a {colour} picture, number {number}")
        split = ("dev", "test")[number % 2]
        table.append({"image": name, "caption": caption})
        columns[name] = {"split": split, "number": number}
    write_table(folder / "captions.jsonl", table)
    Image.effect_noise((6000, 5000), 40).convert("RGB").save(folder / "large.jpg", quality=30)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "empty.png").write_bytes(b"")
    model = align_jax.load(folder / "model")
    with align_jax.open_index(folder / "index", model) as index:
        ingest.add(index, model, f"{folder}/captions.jsonl?images={folder}/images", kind="both")
        for rows, z in list(index.scan({"kind": "image"})):
            index.add(
                [row.key for row in rows],
                z,
                captions=[row.caption for row in rows],
                sources=[row.source for row in rows],
                metadata=[columns[row.key] for row in rows],
            )


def start_browser(profile):
    """Returns a driver of Chromium, with a folder for its profile."""
    os.environ["SE_OFFLINE"] = "true"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


class Page:
    """The page in the browser, by the names of its elements."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, fragment=""):
        self.driver.get("about:blank")
        self.size(1200, 900)
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(f"{self.address}/{fragment}")
        self.until(lambda: self.text("about"))
        return self

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def at(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, name):
        return self.at(name).text

    def put(self, name, text):
        self.at(name).clear()
        if len(text) > 200:  # typing takes too long
            self.run("arguments[0].value = arguments[1]", self.at(name), text)
        else:
            self.at(name).send_keys(text)

    def more(self):
        if self.at("more").get_attribute("open") is None:
            self.all("summary")[0].click()

    def mode(self, name):
        self.all(f"input[value={name}]")[0].send_keys(" ")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition, timeout_s=30):
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(self.run("return document.body.innerText"))
            time.sleep(0.02)
        return found

    def is_busy(self):
        return self.at("results").get_attribute("aria-busy") == "true"

    def ask(self):
        """Presses the button and waits for the answer; returns the line above the results."""
        self.at("submit").click()
        return self.wait()

    def wait(self):
        self.until(lambda: not self.is_busy())
        return self.text("status")

    def keys(self):
        texts = "return [...document.querySelectorAll('.extra')].map(one => one.textContent)"
        return [text.split(" · ")[0] for text in self.run(texts)]

    def scores(self):
        return [float(one.text) for one in self.all("#list .score")]

    def error(self, name):
        """Returns the error at a field, which must say that it is wrong."""
        self.until(lambda: self.text(f"{name}-error"))
        assert self.at(name).get_attribute("aria-invalid") == "true"
        return self.text(f"{name}-error")

    def console(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        events = (json.loads(e["message"])["message"] for e in self.driver.get_log("performance"))
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


def to_base64(path):
    """Returns the content of a file."""
    return base64.b64encode(path.read_bytes()).decode()
