"""The page in a real browser: choose, watch, compare, zoom, download, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import base64
import io
import re
import shutil

import bundles
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")

import serving  # noqa: E402
from serving import Slow, decoded, encoded, photo  # noqa: E402

from sdk import Upscaler  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
MODELS = (str(bundles.shared("blur")), str(bundles.shared("unet")))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        made = tool.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield made
        made.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Give `open_page(**options)`: a page, shown by a server of its own with these options."""
    contexts, complaints = [], []

    def make(*, viewport: tuple[int, int] = (1000, 800), **options: object):
        server = serving.make_server(tmp_path / f"state{len(contexts)}", **({"models": MODELS} | options))
        running = serving.running(server)
        context = browser.new_context(viewport={"width": viewport[0], "height": viewport[1]}, accept_downloads=True)
        contexts.append((context, running))
        address = running.__enter__()
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Policy" in message.text else None)
        page.on("request", lambda request: complaints.append(request.url) if "127.0.0.1" not in request.url
                and not request.url.startswith(("blob:", "data:")) else None)  # fmt: skip
        page.goto(address)
        return page, server

    yield make
    for context, running in contexts:
        context.close()
        running.__exit__(None, None, None)
    assert complaints == []


def picture(image: np.ndarray, name: str = "my picture.png") -> dict[str, object]:
    return {"name": name, "mimeType": "image/png", "buffer": encoded(image)}


def send(page, chosen: dict[str, object]) -> None:
    page.locator("#file").set_input_files(chosen)
    page.get_by_role("button", name="Enlarge").click()


def finish(page) -> None:
    page.wait_for_selector("#result:not([hidden])")
    playwright.expect(page.locator("#status")).to_have_text("Done.")


def test_a_picture_is_chosen_enlarged_compared_and_downloaded(open_page):
    page, server = open_page()
    page.locator("#model").select_option("blur")
    page.locator("#file").set_input_files(picture(photo(60, 80)))
    playwright.expect(page.locator("#chosen")).to_contain_text("my picture.png")
    page.get_by_role("button", name="Enlarge").click()
    finish(page)
    assert page.locator("#sizes").inner_text().startswith("80 \N{MULTIPLICATION SIGN} 60 \N{RIGHTWARDS ARROW} 160")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "my picture-enlarged.png"
    with Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cpu") as upscaler:
        np.testing.assert_array_equal(decoded(download.value.path().read_bytes()), upscaler.upscale(photo(60, 80)))
    serving.until(lambda: sum(server.store.counts().values()) == 0)  # nothing is kept that the page has


def test_the_slider_shows_what_it_says(open_page):
    page, _ = open_page()
    black, white = np.zeros((100, 200, 3), np.uint8), np.full((100, 200, 3), 255, np.uint8)
    send(page, picture(black))
    finish(page)
    # What was sent is black; a white one in its place shows where it is seen.
    page.evaluate("data => { document.getElementById('before').src = data }", _data_url(white))
    page.wait_for_function("document.getElementById('before').complete")
    assert _white_share(page) == pytest.approx(0.5, abs=0.02)
    box = page.locator("#divider").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 3
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 100, y + 20, steps=4)  # a quarter of the 400 pixels
    page.mouse.up()
    assert _white_share(page) == pytest.approx(0.25, abs=0.02)
    slider = page.get_by_role("slider", name="Before and after")
    slider.focus()
    page.keyboard.press("End")
    assert _white_share(page) == pytest.approx(1, abs=0.02)
    assert slider.get_attribute("aria-valuetext") == "100 % before, 0 % after"
    page.keyboard.press("Home")
    assert _white_share(page) == pytest.approx(0, abs=0.02)


def _data_url(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(image)).decode()


def _white_share(page) -> float:
    """Give the share of a row of the compared pictures, away from the divider's grip and the tags, that is white."""
    shot = decoded(page.locator("#pictures").screenshot())
    row = shot[int(0.9 * len(shot)), :, :3]
    return float((row.min(axis=1) > 128).mean())


def test_zoom_keeps_the_middle_and_says_how_much(open_page):
    page, _ = open_page()
    send(page, picture(photo(300, 500)))
    finish(page)
    fit = page.locator("#pictures").bounding_box()["width"]
    assert page.locator("#zoom").inner_text() == f"{round(fit / 10)} %"
    for name, width in (("Zoom in", 1000), ("Zoom in", 2000), ("Zoom out", 1000), ("Fit", fit)):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("#pictures").bounding_box()["width"] == pytest.approx(width, abs=1)
    page.locator("#view").focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.locator("#zoom").inner_text() == "200 %"
    where = page.evaluate("[...['scrollLeft', 'scrollTop']].map(key => document.getElementById('view')[key])")
    view = page.locator("#view").bounding_box()
    assert where[0] + view["width"] / 2 == pytest.approx(1000, abs=25)  # half of 2,000, and a bar
    assert where[1] > 100
    page.mouse.move(view["x"] + 60, view["y"] + 300)
    page.mouse.down()
    page.mouse.move(view["x"] + 160, view["y"] + 340, steps=3)
    page.mouse.up()
    assert page.evaluate("document.getElementById('view').scrollLeft") == pytest.approx(where[0] - 100, abs=2)


def test_it_works_by_keyboard_alone(open_page):
    page, _ = open_page()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")  # the link to the API
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.keyboard.press("Enter")
    chooser.value.set_files(picture(photo()))
    page.keyboard.press("Tab")
    page.keyboard.type("unet")
    assert page.locator("#model").input_value() == "unet"
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "start"
    page.keyboard.press("Enter")
    finish(page)
    assert page.evaluate("document.activeElement.id") == "download"


def test_a_picture_may_be_dropped_or_pasted(open_page):
    page, _ = open_page()
    for kind, carrier in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """async ([kind, carrier, url]) => {
                const data = new DataTransfer();
                const bytes = Uint8Array.from(atob(url.split(",")[1]), (char) => char.charCodeAt(0));
                data.items.add(new File([bytes], kind + ".png", {type: "image/png"}));
                const event = new Event(kind, {bubbles: true, cancelable: true});
                Object.defineProperty(event, carrier, {value: data});
                document.body.dispatchEvent(event);
            }""",
            [kind, carrier, _data_url(photo())],
        )
        playwright.expect(page.locator("#chosen")).to_contain_text(f"{kind}.png")
    page.get_by_role("button", name="Enlarge").click()
    finish(page)


def test_progress_is_seen_and_can_be_cancelled(open_page, monkeypatch):
    slow = Slow(monkeypatch)
    page, server = open_page()
    send(page, picture(photo()))
    playwright.expect(page.locator("#status")).to_have_text("Enlarging…")
    playwright.expect(page.locator("#share")).to_have_text("50 %")
    assert page.get_by_role("progressbar").get_attribute("value") == "0.5"
    assert page.get_by_role("button", name="Enlarge").is_disabled()
    page.get_by_role("button", name="Cancel").click()
    playwright.expect(page.locator("#status")).to_have_text("Cancelled.")
    assert slow.ended.wait(serving.WAIT_S)
    serving.until(lambda: sum(server.store.counts().values()) == 0)
    slow.go.set()
    page.get_by_role("button", name="Enlarge").click()
    finish(page)


def test_leaving_the_page_stops_the_work(open_page, monkeypatch):
    slow = Slow(monkeypatch)
    page, server = open_page()
    send(page, picture(photo()))
    playwright.expect(page.locator("#status")).to_have_text("Enlarging…")
    page.goto("about:blank")
    assert slow.ended.wait(serving.WAIT_S)
    serving.until(lambda: sum(server.store.counts().values()) == 0)


def test_what_goes_wrong_is_told(open_page):
    page, _ = open_page(max_body_mib=1)
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"hello"})
    page.get_by_role("button", name="Enlarge").click()
    error = page.get_by_role("alert")
    playwright.expect(error).to_have_text("The picture: not a picture in a known format.")
    page.locator("#file").set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": bytes(3 << 20)})
    page.get_by_role("button", name="Enlarge").click()
    playwright.expect(error).to_have_text(re.compile("more than 1048576 bytes|has refused the picture"))
    send(page, picture(photo()))
    finish(page)
    playwright.expect(error).to_have_text("")


def test_a_server_with_keys_asks_for_one(open_page):
    page, _ = open_page(keys=("open sesame",))
    playwright.expect(page.get_by_role("alert")).to_contain_text("an API key is needed")
    page.get_by_label("API key").fill("open sesame")
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#model option")).to_have_count(2)
    send(page, picture(photo()))
    finish(page)


def test_the_model_says_what_it_is_for_and_whether_it_keeps_the_size(open_page):
    page, _ = open_page(models=("fast-x2", "fast-x1-jpeg"), backend="auto")
    assert page.locator("#same").is_disabled()
    playwright.expect(page.locator("#summary")).to_have_text(re.compile("Doubles the size"))
    page.locator("#model").select_option("fast-x1-jpeg")
    playwright.expect(page.locator("#summary")).to_have_text(re.compile("Keeps the size"))
    assert page.locator("#same").is_enabled()
    page.locator("#factor").select_option("1")
    page.locator("#model").select_option("fast-x2")
    assert page.locator("#factor").input_value() == ""


def test_a_server_that_comes_back_finishes_the_picture(browser, tmp_path, monkeypatch):
    context = browser.new_context()
    page = context.new_page()
    with monkeypatch.context() as patched:
        slow = Slow(patched)
        with serving.running(serving.make_server(tmp_path / "state", grace_s=0)) as address:
            page.goto(address)
            page.locator("#file").set_input_files(picture(photo()))
            page.get_by_role("button", name="Enlarge").click()
            assert slow.begun.acquire(timeout=serving.WAIT_S)
        playwright.expect(page.locator("#status")).to_have_text("Waiting for the server…")
    port = int(address.rsplit(":", 1)[1])
    with serving.running(serving.make_server(tmp_path / "state"), port=port):
        finish(page)
    context.close()


def test_formats_that_the_browser_does_not_show_can_be_downloaded(open_page):
    page, _ = open_page()
    stream = io.BytesIO()
    Image.fromarray(photo()).save(stream, "TIFF")
    page.locator("#file").set_input_files({"name": "a.tiff", "mimeType": "image/tiff", "buffer": stream.getvalue()})
    page.get_by_role("button", name="Enlarge").click()
    finish(page)
    assert page.locator("#after").is_visible()
    assert not page.locator("#before").is_visible()
    assert not page.locator("#split").is_visible()
    page.locator("#format").select_option("tiff")
    page.get_by_role("button", name="Enlarge").click()
    playwright.expect(page.locator("#sizes")).to_contain_text("this browser does not show TIFF")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert decoded(download.value.path().read_bytes()).shape == (48, 60, 3)


def test_it_fits_a_phone(open_page):
    page, _ = open_page(viewport=(360, 640))
    send(page, picture(photo(300, 500)))
    finish(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for role, name in (
        ("button", "Enlarge"),
        ("link", "Download"),
        ("button", "Zoom in"),
        ("slider", "Before and after"),
    ):
        box = page.get_by_role(role, name=name).bounding_box()
        assert box["height"] >= 44, name  # a finger
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 360, name


def test_the_documentation_works_offline(open_page):
    page, _ = open_page()
    page.get_by_role("link", name="API").click()
    playwright.expect(page.locator(".opblock").first).to_be_visible()
    assert page.locator(".opblock").count() == 10
