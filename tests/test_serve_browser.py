"""The page of `align serve` in Chromium, with a real server, against the library's own answers."""

import urllib.request

import numpy as np
import pytest
from browser import (
    EVIL,
    LONG,
    Page,
    browser_test,
    make_world,
    start_browser,
    start_server,
    to_base64,
)

import align_jax
from align_jax.search import filters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    make_world(folder := tmp_path_factory.mktemp("page"))
    return folder


@pytest.fixture(scope="module")
def model(world):
    return align_jax.load(world / "model")


@pytest.fixture(scope="module")
def expected(world, model):
    """The index's own answers to the queries below."""
    picture, where = world / "images" / "3.png", {"kind": "image"}
    with align_jax.open_index(world / "index", model) as index:
        return {
            "text": index.search(text="a red picture", k=30, filter=where),
            "picture": index.search(image=picture, k=24, filter=where),
            "change": index.search(
                image=picture, add=["red"], remove=["black"], weight=0.5, k=12, filter=where
            ),
            "filter": index.search(
                text="a dog", k=24, filter=where | {"split": "dev", "number": {"gte": 8, "lt": 20}}
            ),
        }


@pytest.fixture(scope="module")
def server(world, expected):
    process, address = start_server(world / "model", world / "index", world)
    yield address
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    yield (driver := start_browser(tmp_path_factory.mktemp("profile")))
    driver.quit()


@pytest.fixture
def page(driver, server):
    return Page(driver, server).open()


def assert_hits(page, hits):
    assert len(hits) == len(page.keys())
    # Rows whose scores agree to 1e-3, which is what is shown, may change places.
    np.testing.assert_allclose(page.scores(), [hit.score for hit in hits], atol=1.1e-3)
    assert set(page.keys()) == {hit.key for hit in hits}


@browser_test
def test_text_finds_pictures_with_alternative_text_and_nothing_leaves_the_origin(page, expected):
    page.more()
    page.put("k", "30")
    page.put("text", "a red picture\n")  # Enter
    page.until(lambda: page.all(".hit"))
    assert page.wait().startswith("30 results · ")
    assert_hits(page, expected["text"])
    page.run("document.querySelectorAll('.hit img').forEach(img => { img.loading = 'eager'; })")
    images = page.all(".hit img")
    assert len(images) == 30
    page.until(lambda: page.run("return [...arguments[0]].every(img => img.naturalWidth)", images))
    assert all(image.get_attribute("alt").strip() for image in images)
    assert page.console() == []
    urls = page.requests()
    assert len(urls) > 30 and all(url.startswith((page.address, "blob:")) for url in urls)
    assert page.driver.title == "a red picture – align"


@browser_test
def test_picture_by_file_paste_and_drop(page, expected, world):
    path = world / "images" / "3.png"
    page.at("picture").send_keys(str(path))
    page.until(lambda: page.text("picture-name") == "3.png")
    assert page.ask().startswith("24 results")
    assert_hits(page, expected["picture"])
    assert page.keys()[0] == expected["picture"][0].key and page.scores()[0] > 0.999
    for event in ("paste", "drop"):
        page.at("clear").click()
        assert page.text("list") == "" and page.keys() == []
        page.run(
            """
            const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "own.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(arguments[0] === "paste"
              ? new ClipboardEvent("paste", { ...options, clipboardData: data })
              : new DragEvent("drop", { ...options, dataTransfer: data }));
            """,
            event,
            to_base64(path),
        )
        page.until(lambda: page.text("picture-name") == "own.png")
        page.ask()
        assert_hits(page, expected["picture"])
    assert page.console() == []


@browser_test
def test_picture_with_a_change(page, expected, world):
    page.at("picture").send_keys(str(world / "images" / "3.png"))
    page.put("remove", "black")
    page.put("add", "red")
    page.more()
    page.put("k", "12")
    page.put("weight", "0.5")
    page.ask()
    assert_hits(page, expected["change"])
    assert page.console() == []


@browser_test
def test_filters(page, expected):
    page.put("text", "a dog")
    page.more()
    page.put("filter", "split = dev\nnumber>=8\nnumber < 20")
    assert page.ask().startswith(f"{len(expected['filter'])} results")
    assert_hits(page, expected["filter"])
    page.put("filter", "key=nobody")
    assert page.ask() == "Nothing was found."
    page.put("filter", "split dev")
    page.ask()
    assert page.error("filter") == "split dev is no filter; write field=value."
    page.put("filter", '{"split": {"like": "d"}}')
    page.ask()
    assert "'like' is unknown" in page.error("filter")  # the server's
    page.put("filter", "split=dev")
    page.ask()
    assert page.text("filter-error") == "" and not page.at("filter").get_attribute("aria-invalid")


LINES = r"""
split=dev;split == dev ;n != 7;n<7;n <= -1.5e3;score>0.25;score >= 1;caption=7;key in 1,b
tag in a, 2,true;text="7";text="";ok=true;ok=null;x==a=b;a b=c d;n=1e999;n=[1];split;=x;{1
{"score": {"gte": 0.3, "lt": 1}, "split": "dev", "tag": {"in": ["a", 1]}};n>1|n<5;n=1|n==2
{"n": {"eq": 1}}|n=1
"""  # "|" ends a line of one filter


@browser_test
def test_filters_are_those_of_the_command_line(page):
    """Oracle: search.filters.parse."""
    read = """
        const [text, done] = arguments;
        import(new URL("page/query.js", document.baseURI)).then(({ parseFilter }) => {
          try { done(parseFilter(text)); } catch (error) { done("error"); }
        });
    """
    for text in LINES.strip().replace("\n", ";").split(";"):
        text = text.replace("|", "\n")
        try:
            wanted = filters.parse(text.split("\n"))
        except ValueError:
            wanted = "error"
        assert page.driver.execute_async_script(read, text) == wanted, text


@browser_test
def test_classification_is_that_of_the_model(page, model, world):
    labels = ["red", "olive <b>oil</b>", "a cat", "dog"]
    page.mode("classify")
    page.at("picture").send_keys(str(world / "images" / "5.png"))
    page.put("labels", "\n".join(labels) + "\n\n")
    page.put("template", "two {} circles")
    status = page.ask()
    (wanted,) = model.classify([world / "images" / "5.png"], labels, ("two {} circles",))
    shown = [row.text.split("\n") for row in page.all(".bars li")]
    order = np.argsort(-wanted)
    assert [label for label, _ in shown] == [labels[i] for i in order]
    percent = [float(text.removesuffix(" %")) for _, text in shown]
    np.testing.assert_allclose(percent, 100 * wanted[order], atol=0.051)
    assert status == f"Most likely: {labels[order[0]]}, {shown[0][1]}"
    assert page.console() == []
    page.put("template", "no place")
    page.ask()
    assert "{}" in page.error("template")
    page.put("template", "{}")
    page.put("labels", "red\n" + "x" * 1001)
    page.ask()
    assert "1,001" in page.error("labels")


@browser_test
def test_comparison_is_the_cosine(page, model, world):
    texts = ["a photo of a cat", "squares", "on a mat"]
    page.mode("compare")
    page.at("picture").send_keys(str(world / "images" / "4.png"))
    page.put("texts", "\n".join(texts))
    assert page.ask() == "Cosine similarity"
    z_text = model.encode_text(texts)
    for z in (model.encode_image([world / "images" / "4.png"])[0], model.encode_text(["a dog"])[0]):
        wanted = sorted(zip((z_text @ z).tolist(), texts, strict=True), reverse=True)
        assert [row.text.split("\n")[0] for row in page.all(".bars li")] == [t for _, t in wanted]
        np.testing.assert_allclose(page.scores(), [score for score, _ in wanted], atol=6e-4)
        if page.at("chosen").is_displayed():
            page.at("picture-clear").click()
            page.put("text", "a dog")
            page.ask()
    assert page.console() == []


@browser_test
def test_a_result_is_the_next_query_and_back_and_links_work(page, expected):
    page.more()
    page.put("k", "30")
    page.put("text", "a red picture")
    page.ask()
    second = "sub dir/ü #8? 100%.png"
    page.all(".hit")[page.keys().index(second)].click()
    page.until(lambda: page.text("picture-name") == second)
    page.wait()
    assert page.keys()[0] == second and page.scores()[0] > 0.9
    assert page.at("text").get_attribute("value") == ""
    keys = page.keys()
    url = page.driver.current_url
    page.driver.back()
    page.until(lambda: page.at("text").get_attribute("value") == "a red picture")
    page.until(lambda: page.keys() != keys)
    page.wait()
    assert_hits(page, expected["text"])
    assert not page.at("chosen").is_displayed()
    page.driver.forward()
    page.until(lambda: page.text("picture-name") == second)
    page.until(lambda: page.keys() == keys)
    page.open(url.rpartition("/")[2])  # as somebody else, in a fresh page
    page.until(page.keys)
    assert page.keys() == keys
    assert page.console() == []
    page.more()
    page.at("kind").send_keys("texts")
    page.ask()
    caption = page.all(".words")[0].text
    page.all(".hit")[0].click()
    page.until(lambda: page.at("text").get_attribute("value") == caption)
    page.wait()
    assert page.scores()[0] > 0.999


@browser_test
def test_an_uploaded_picture_is_there_after_back_and_is_missed_in_a_link(page, world):
    page.at("picture").send_keys(str(world / "images" / "7.png"))
    page.ask()
    keys, url = page.keys(), page.driver.current_url
    page.at("picture-clear").click()
    page.put("text", "squares")
    page.ask()
    page.driver.back()
    page.until(lambda: page.text("picture-name") == "7.png")
    page.until(lambda: page.keys() == keys)
    page.open(url.rpartition("/")[2])
    assert "7.png" in page.error("picture")
    assert page.keys() == [] and page.console() == []


@browser_test
def test_keyboard_alone(page, driver):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(driver).send_keys(*keys).perform()

    def focused():
        return page.run(
            """
            const e = document.activeElement, drop = document.getElementById("drop");
            const seen = e.id === "picture" ? drop : e.type === "radio" ? e.nextElementSibling : e;
            const { outlineStyle, outlineWidth } = getComputedStyle(seen);
            return [e.id || e.value || e.tagName, outlineStyle + " " + outlineWidth];
            """
        )

    seen = []
    for _ in range(8):
        press(Keys.TAB)
        name, outline = focused()
        assert outline == "solid 3px", name
        seen.append(name)
    names = ["search", "picture", "text", "remove", "add", "SUMMARY", "submit", "clear"]
    assert seen == names
    page.at("text").send_keys("")
    press("a red picture", Keys.ENTER)
    page.until(page.keys)
    page.wait()
    for _ in range(6):
        press(Keys.TAB)
    assert page.run("return document.activeElement.className") == "hit"
    first = page.keys()[0]
    press(Keys.ENTER)
    page.until(lambda: page.text("picture-name") == first)
    page.wait()
    assert focused() == ["status", "solid 3px"]  # the results that had the focus are gone
    page.all("input[name=mode]")[0].send_keys("")
    press(Keys.ARROW_RIGHT)
    assert page.text("submit") == "Classify" and page.at("labels").is_displayed()
    page.at("labels").send_keys("")
    press("cat", Keys.ENTER, "dog")
    ActionChains(driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: page.text("status").startswith("Most likely"))
    assert len(page.all(".bars li")) == 2
    assert page.console() == []


@browser_test
def test_no_horizontal_scroll_at_any_width(page, world):
    def check():
        for width in (320, 400, 820, 1200):
            page.size(width, 800)
            scroll = "return document.documentElement.scrollWidth - innerWidth"
            assert page.run(scroll) <= 0, width

    page.at("picture").send_keys(str(world / "images" / "2.png"))
    page.more()
    page.put("filter", LONG)
    page.ask()
    assert page.error("filter")
    check()
    page.put("filter", "")
    page.at("kind").send_keys("both")
    page.ask()
    assert page.keys()
    check()
    page.mode("classify")
    page.put("labels", "cat\n" + LONG[:900])
    page.ask()
    assert page.all(".bars li")
    check()
    page.mode("compare")
    page.put("texts", "cat\n" + LONG)
    page.ask()
    assert page.all(".bars li")
    check()


@browser_test
def test_captions_are_text(page):
    page.put("text", "x")
    page.more()
    page.put("k", "100")
    for kind in ("pictures", "texts"):
        page.at("kind").send_keys(kind)
        page.ask()
        shown = page.run("return [...document.querySelectorAll('.hit')].map(e => e.innerText)")
        assert any(EVIL in text for text in shown)
        assert any("<b>bold</b>" in text for text in shown)
        cut = max(
            page.run(
                "return [...document.querySelectorAll('.hit span')].map(e => e.textContent.length)"
            )
        )
        assert cut == 301  # of 10 kB, and an ellipsis
        assert page.run("return document.querySelectorAll('#list script, #list b').length") == 0
    for mode, field in (("compare", "texts"), ("classify", "labels")):
        page.mode(mode)
        page.put(field, EVIL)
    assert page.run("return window.pwned") is None
    assert page.console() == []


@browser_test
def test_errors_are_lines_at_the_fields_they_name(page, world):
    page.ask()
    assert page.error("text") == "Give a text or a picture."
    page.put("text", "a dog")
    page.more()
    for k in ("1001", "0", "2.5", ""):
        page.put("k", k)
        page.ask()
        assert page.error("k") == "Write a whole number from 1 to 1000."
        assert page.text("text-error") == "" and page.run("return document.activeElement.id") == "k"
    page.put("k", "5")
    page.put("add", "x" * 100_001)
    page.ask()
    assert "100,001 characters" in page.error("add")  # the server's
    page.put("add", "")
    for file, words in (("notes.txt", "is no picture"), ("empty.png", "is empty")):
        page.at("picture").send_keys(str(world / file))
        page.until(lambda words=words: words in page.text("picture-error"))
        assert not page.at("chosen").is_displayed()
    page.at("picture").send_keys(str(world / "broken.png"))
    page.ask()
    assert "image" in page.error("picture")  # the server's
    page.put("text", "")
    page.at("picture-clear").click()
    page.run(
        """
        const data = new DataTransfer();
        data.setData("text/uri-list", "http://elsewhere.example/cat.png");
        const options = { bubbles: true, cancelable: true, dataTransfer: data };
        document.body.dispatchEvent(new DragEvent("drop", options));
        """
    )
    assert page.error("picture").startswith("That is no file")


@browser_test
def test_a_picture_of_30_megapixels_is_made_smaller(page, world):
    page.at("picture").send_keys(str(world / "large.jpg"))
    page.ask()
    assert page.text("picture-name") == "large.jpg, sent as 2048 × 1707, it has 6000 × 5000"
    assert len(page.keys()) == 24 and page.console() == []


@browser_test
def test_double_clicks_ask_once_and_a_newer_question_takes_over(page):
    page.run(
        """
        window.asked = 0;
        const real = window.fetch;
        window.fetch = (...given) => {
          if (!String(given[0]).endsWith("v1/search")) return real(...given);
          window.asked++;
          const slow = JSON.parse(given[1].body).text === "slow";
          return new Promise((resolve, reject) => {
            given[1].signal.addEventListener("abort", () => reject(given[1].signal.reason));
            setTimeout(() => resolve(real(...given)), slow ? 60000 : 300);
          });
        };
        """
    )
    page.put("text", "slow")
    button = page.at("submit")
    for _ in range(3):
        button.click()
    assert page.is_busy() and page.text("status") == "Working…"
    assert page.run("return window.asked") == 1
    page.until(page.at("stop").is_displayed)
    page.put("text", "a dog")
    assert page.ask().startswith("24 results")
    assert page.run("return window.asked") == 2
    page.put("text", "slow")
    button.click()
    page.until(page.at("stop").is_displayed)
    page.at("stop").click()
    assert page.text("status") == "Stopped." and not page.is_busy()
    assert not page.at("stop").is_displayed()


@browser_test
def test_the_page_has_a_strict_policy(page):
    for path in ("/", "/page/page.js", "/page/page.css"):
        with urllib.request.urlopen(page.address + path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1';"
        "document.body.append(s)"
    )
    assert page.run("return window.pwned") is None  # the browser refuses it, too


@browser_test
def test_without_an_index_with_a_key_and_when_the_server_has_gone(driver, world):
    (world / "key").write_text("secret\n")
    process, address = start_server(world / "model", None, world, "--key-file", world / "key")
    try:
        page = Page(driver, address.replace("://", "://user:secret@")).open()
        assert page.text("about").endswith("no index") and page.at("no-index").is_displayed()
        assert not page.all("input[value=search]")[0].is_enabled()
        assert page.text("submit") == "Classify" and not page.at("remove").is_displayed()
        page.at("picture").send_keys(str(world / "images" / "5.png"))
        page.put("labels", "cat\ndog")
        assert page.ask().startswith("Most likely")
        page.mode("compare")
        page.put("texts", "cat\ndog")
        assert page.ask() == "Cosine similarity"
        assert page.console() == []
    finally:
        process.terminate()
        assert process.wait(30) == 0
    page.ask()
    page.until(lambda: page.text("failure"))
    assert page.text("failure").startswith("The server cannot be reached")
    assert page.text("status") == "" and len(page.all(".bars li")) == 2  # what was there stays
