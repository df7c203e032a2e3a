"""The files of the page of `align serve`; test_serve_browser.py uses it."""

import ast
import fnmatch
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "align_jax" / "serve" / "page"
FILES = sorted(PAGE.iterdir())


class _Tags(HTMLParser):
    """Collects (tag, attributes), and text within scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inline = [], []
        self._within = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def tags():
    return _Tags((PAGE / "index.html").read_text())


def test_all_files_are_in_the_package():
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    (data,) = [one.value for one in call.keywords if one.arg == "package_data"]
    patterns = ast.literal_eval(data)["align_jax.serve"]
    names = {path.relative_to(PAGE.parent).as_posix() for path in FILES}
    assert {"page/index.html", "page/page.css", "page/page.js", "page/favicon.svg"} <= names
    assert all(any(fnmatch.fnmatch(name, one) for one in patterns) for name in names)


def test_nothing_is_inline_and_all_that_is_named_is_there(tags):
    assert not tags.inline
    for tag, attributes in tags.tags:
        assert tag != "style"
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        for name in ("src", "href"):
            if name in attributes:
                assert (PAGE.parent / attributes[name]).is_file()
    for path in PAGE.glob("*.js"):
        for name in re.findall(r'from "(.+?)"', path.read_text()):
            assert (PAGE / name).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_foreign_host_and_no_text_as_html(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\w:?//\w|url\(|@import", text)
    unsafe = r"HTML\b|document\.write|\beval\b|Function\(|DOMParser|srcdoc|Contextual|javascript:"
    assert not re.search(unsafe, text)


def test_every_field_has_a_label_a_place_for_its_error_and_a_name_in_the_program(tags):
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in tags.tags if tag == "label"}
    for tag, attributes in tags.tags:
        if tag in ("input", "textarea", "select") and attributes.get("type") != "radio":
            assert attributes["id"] in labelled
            assert f"{attributes['id']}-error" in attributes["aria-describedby"].split()
        for name in attributes.get("aria-describedby", "").split():
            assert name in ids
    named = set(re.findall(r'\bat\("(.+?)"\)', (PAGE / "page.js").read_text()))
    assert len(named) > 15 and named <= set(ids)
