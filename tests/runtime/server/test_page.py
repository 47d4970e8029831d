"""The page in a real browser: Chromium, without a window. What people do there, and what they see of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conceptmaster.runtime.bundle_format import DEFAULT

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser's tests need playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = sync_api.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PATIENCE = 60_000.0  # milliseconds
expect.set_options(timeout=PATIENCE)
EXAMPLES = Path(__file__).parents[3] / "examples"
REQUESTS = EXAMPLES / "sprites" / "requests"
FLOWER, ROCKET = REQUESTS / "first" / "1.png", REQUESTS / "first" / "2.png"
PROMPT = "a flower in the middle moves down and a rocket on the left moves up, at sunset"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
# What a page may not do, told to the console, where the test looks.
VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => console.error("policy", event.violatedDirective));
"""
DROP = """([target, kind, names]) => {
  const data = new DataTransfer();
  const file = ([name, bytes]) => new File([new Uint8Array(bytes)], name, {type: "image/png"});
  names.forEach(named => data.items.add(file(named)));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
    : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
  document.querySelector(target).dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def sprites(serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of the fake bundle and of the sprites, for all tests that leave it well."""
    with serving("--bundle", "sprites", data=tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture
def empty(sprites: Any) -> Any:
    """The same server, of which nobody has asked anything."""
    for video in sprites.http.get("/v1/videos?limit=100").json()["data"]:
        sprites.http.delete(f"/v1/videos/{video['id']}")
    return sprites


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """`open_page(server)` → a page. At the end none may have complained, but of `page.expected`."""
    opened = []

    def start(server: Any, viewport: dict[str, int] = DESKTOP, expected: str = "$^", **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, reduced_motion="no-preference", **options)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.add_init_script(VIOLATIONS)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on(
            "request", lambda asked: _is_home(asked.url, server.url) or wrong.append(f"asked {asked.url}")
        )
        opened.append((context, wrong, expected))
        page.goto(server.url)
        page.locator("body.ready, dialog[open]").first.wait_for()
        return page

    yield start
    for context, wrong, expected in opened:
        context.close()
        assert [text for text in wrong if not re.search(expected, text)] == []


def _is_home(url: str, home: str) -> bool:
    return url.startswith((f"{home}/", "blob:", "data:"))


def fill(page: Any, prompt: str = PROMPT, **options: str) -> None:
    """The form, with the model of the sprites and two pictures."""
    page.get_by_label("Model").select_option("sprites")
    page.set_input_files("#files", [FLOWER, ROCKET])
    page.get_by_label("Picture 1 shows").fill("flower")
    page.get_by_label("Picture 2 shows").fill("rocket")
    page.get_by_label("What happens").fill(prompt)
    page.get_by_text("More options").click()
    for label, value in options.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_text("More options").click()


def sent(page: Any, press: Callable[[], None] | None = None) -> Any:
    """The card that comes when a button is pressed, or the form's."""
    cards = page.locator(".card")
    count = cards.count()
    (press or page.locator("#send").click)()
    expect(cards).to_have_count(count + 1)
    return page.locator(f".card[data-id={cards.first.get_attribute('data-id')}]")


def wait_until(card: Any, status: str) -> None:
    expect(card).to_have_attribute("data-status", status)


def wait_until_it_plays(page: Any, clip: Any) -> None:
    """And begins again when it ends."""
    page.wait_for_function(
        "clip => clip.loop && !clip.paused && clip.currentTime > 0", arg=clip.element_handle()
    )


def newest_video(server: Any) -> dict[str, Any]:
    return server.http.get("/v1/videos?limit=1").json()["data"][0]


def violations(page: Any) -> list[str]:
    """What axe-core finds that keeps people out."""
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 10  # it has looked
    severe = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in severe]


# ---- making videos


def test_a_video_from_pictures_and_a_prompt_to_the_download(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    fill(page, Seed="11", Steps="3", **{"How many": "2"})
    expect(page.locator("#send")).to_have_text("Make 2 videos")
    card = sent(page)
    wait_until(card, "completed")
    expect(card).to_contain_text("seed 11 · 3 steps")
    video = newest_video(sprites)
    wanted = {"prompt": PROMPT, "labels": ["flower", "rocket"], "seed": 11, "n": 2, "options": {"steps": 3}}
    assert {name: video[name] for name in wanted} == wanted
    for at, picture in enumerate((FLOWER, ROCKET)):
        kept = sprites.http.get(f"/v1/videos/{video['id']}/references/{at}")
        assert kept.content == picture.read_bytes() and kept.headers["content-type"] == "image/png"

    clips = card.locator("video")
    expect(clips).to_have_count(2)
    for clip in clips.all():
        wait_until_it_plays(page, clip)
    card.get_by_role("button", name="Pause").click()
    assert clips.first.evaluate("clip => clip.paused")

    card.get_by_role("button", name="Open video 2 of 2").click()
    viewer = page.get_by_role("dialog")
    sheet = viewer.get_by_role("img", name="contact sheet")
    sheet.evaluate("image => image.decode()")
    assert "variant=spritesheet&index=1" in sheet.get_attribute("src")
    with page.expect_download() as download:
        viewer.get_by_role("link", name="Video").click()
    made = sprites.http.get(f"/v1/videos/{video['id']}/content?index=1").content
    assert Path(download.value.path()).read_bytes() == made
    assert download.value.suggested_filename == f"{video['id']}-1.mp4"
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_an_example_in_one_click_and_then_another_seed(empty: Any, open_page: Open) -> None:
    page = open_page(empty)
    wait_until(sent(page, page.get_by_role("button", name="Make this video").first.click), "completed")
    first = newest_video(empty)
    assert (first["prompt"], first["seed"], first["warnings"]) == (PROMPT, 5, [])
    wait_until(sent(page, page.get_by_role("button", name="New seed").click), "completed")
    second = newest_video(empty)
    assert second["seed"] != 5 and second["labels"] == first["labels"]


def test_every_example_can_be_filled_in(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    page.get_by_label("Model").select_option("sprites")
    for folder in ("first", "twins", "three", "first"):
        request = json.loads((REQUESTS / folder / "request.json").read_text())
        page.get_by_role("button", name="Fill in an example").click()
        expect(page.get_by_label("What happens")).to_have_value(request["prompt"])
        expect(page.locator(".tile")).to_have_count(len(request["concepts"]))


def test_the_default_bundle_has_examples_of_pictures_that_nobody_here_drew(
    serving: Callable[..., Any], open_page: Open, tmp_path: Path
) -> None:
    with serving("--bundle", DEFAULT, data=tmp_path) as running:
        page = open_page(running, expected="ERR_")  # the server goes first
        page.get_by_label("Model").select_option(DEFAULT)
        expect(page.get_by_role("button", name="Places", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Things", exact=True)).to_have_count(0)  # any word will do
        for folder in ("first", "twins", "made-up", "three"):
            request = json.loads((EXAMPLES / DEFAULT / "requests" / folder / "request.json").read_text())
            page.get_by_role("button", name="Fill in an example").click()
            expect(page.get_by_label("What happens")).to_have_value(request["prompt"])
            expect(page.locator(".tile")).to_have_count(len(request["concepts"]))
        wait_until(sent(page), "completed")
        made = newest_video(running)
        assert (made["model"], made["seed"], made["warnings"]) == (DEFAULT, 2, [])


def test_what_was_made_can_be_put_into_the_form(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    fill(page, Seed="21", Steps="2")
    page.get_by_label("Negative prompt").evaluate("field => field.value = 'a car'")
    card = sent(page)
    wait_until(card, "completed")
    page.reload()
    card.get_by_role("button", name="Same seed").click()
    expect(page.get_by_label("What happens")).to_have_value(PROMPT)
    expect(page.get_by_label("Picture 2 shows")).to_have_value("rocket")
    expect(page.get_by_label("Seed")).to_have_value("21")
    expect(page.get_by_label("Steps")).to_have_value("2")
    expect(page.get_by_label("Negative prompt")).to_have_value("a car")
    first = newest_video(sprites)
    wait_until(sent(page, lambda: page.keyboard.press("Control+Enter")), "completed")
    second = newest_video(sprites)
    assert second["id"] != first["id"]
    assert sprites.content(second["id"]) == sprites.content(first["id"])  # to the byte


def test_boxes_come_with_a_model_that_takes_them_and_are_kept(
    placing: Callable[..., Path], start_server: Any, open_page: Open
) -> None:
    server = start_server("--bundle", str(placing()))
    page = open_page(server, expected="400")
    boxes = page.get_by_label("Boxes, by what they hold")
    page.get_by_text("More options").click()
    expect(boxes).to_be_hidden()
    page.get_by_label("Model").select_option("placing")
    page.set_input_files("#files", [FLOWER])
    page.get_by_label("Picture 1 shows").fill("ball")
    page.get_by_label("What happens").fill("a ball rolls left")
    boxes.fill('{"cat": [0, 0, 1, 1]}')
    page.locator("#send").click()
    expect(page.locator("#boxes-error")).to_contain_text("no concept is labelled so: the labels are 'ball'")
    boxes.fill('{"ball": {"0": [0, 0, 0.5, 1], "8": [0.5, 0, 1, 1]}}')
    card = sent(page)
    wait_until(card, "completed")
    asked = newest_video(server)["options"]["boxes"]
    assert asked == {"ball": {"0": [0, 0, 0.5, 1], "8": [0.5, 0, 1, 1]}}
    page.reload()
    card.get_by_role("button", name="Same seed").click()
    expect(boxes).to_have_value('{"ball":{"0":[0,0,0.5,1],"8":[0.5,0,1,1]}}')
    wait_until(sent(page, lambda: page.get_by_role("button", name="New seed").first.click()), "completed")
    assert newest_video(server)["options"]["boxes"] == asked


def test_previews_reload_cancel_retry_and_delete(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    fill(page, Steps="500")
    made = sent(page)
    page.get_by_label("Steps").evaluate("field => field.value = 2")
    waits = sent(page)
    expect(waits).to_contain_text("it is next")  # one worker: it waits
    made.locator(".preview").first.wait_for()

    page.reload()  # in the middle
    wait_until(waits, "queued")
    expect(made).to_have_attribute("data-status", "in_progress")
    made.locator(".preview").first.wait_for()
    expect(made).to_contain_text(re.compile(r"Step \d+ of 500"))
    assert made.locator("progress").evaluate("bar => bar.value") > 0
    pictures = made.locator(".references img")
    expect(pictures).to_have_count(2)
    pictures.first.evaluate("image => image.decode()")

    made.get_by_role("button", name="Cancel").click()
    expect(made).to_have_attribute("data-status", "cancelled")
    wait_until(waits, "completed")  # its turn came
    cancelled = sprites.http.get("/v1/videos?limit=2").json()["data"][1]
    assert cancelled["status"] == "cancelled"
    retried = sent(page, made.get_by_role("button", name="Retry").click)
    wait_until(retried, "in_progress")
    again = newest_video(sprites)
    for name in ("prompt", "labels", "seed", "options", "model"):
        assert again[name] == cancelled[name]
    retried.get_by_role("button", name="Cancel").click()
    wait_until(retried, "cancelled")
    count = page.locator(".card").count()
    retried.get_by_role("button", name="Delete").click()
    assert page.locator(".card").count() == count  # it asks first
    retried.get_by_role("button", name="Really delete?").click()
    expect(page.locator(".card")).to_have_count(count - 1)
    assert sprites.http.get(f"/v1/videos/{again['id']}").status_code == 404


# ---- what is wrong, and what may be


def test_errors_stand_beside_what_they_are_about(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites, expected="400")
    page.get_by_label("Model").select_option("sprites")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#prompt-error")).to_have_text("say what happens in the video")
    expect(page.get_by_label("What happens")).to_be_focused()
    fill(page, Steps="0")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#steps-error")).to_have_text("steps must be 1 to 1000, not 0")
    expect(page.get_by_label("Steps")).to_be_focused()  # what was closed is open
    page.get_by_label("Steps").fill("2")
    page.get_by_label("Picture 2 shows").fill("flower")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#pictures-error")).to_contain_text("two concepts are labelled 'flower'")
    expect(page.locator("#steps-error")).to_be_hidden()
    page.set_input_files("#files", [Path(__file__)])
    expect(page.locator("#pictures-error")).to_have_text("test_page.py is not a picture")
    page.set_input_files("#files", [FLOWER] * 4)
    expect(page.locator("#pictures-error")).to_have_text("the model sprites takes at most 4 pictures")
    expect(page.locator(".tile")).to_have_count(4)


def test_words_are_offered_and_warned_of(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    fill(page, "a flower and a dragon", Steps="2")
    hints = page.locator("#hints")
    expect(hints).to_contain_text("“rocket” is not in the prompt")
    expect(hints).to_contain_text("was not taught “dragon”")
    expect(page.locator("#marks mark")).to_have_text(["flower"])
    warnings = sent(page).locator(".warnings")  # it is allowed
    expect(warnings).to_contain_text("the label 'rocket' is not in the caption")  # the server's own words
    expect(warnings).to_contain_text("the model does not know 'dragon'")
    page.get_by_label("What happens").fill("a flower")
    for name in ("Places", "in the middle", "Backgrounds", "at sunset"):
        page.get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_label("What happens")).to_have_value("a flower in the middle, at sunset")
    page.get_by_role("button", name="Add it").click()
    expect(page.get_by_label("What happens")).to_have_value("a flower in the middle, at sunset rocket")
    expect(hints).to_be_empty()
    expect(page.locator("#marks mark")).to_have_text(["flower", "rocket"])


def test_pictures_are_pasted_dropped_and_put_in_order(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    page.get_by_label("Model").select_option("sprites")
    data = list(FLOWER.read_bytes())
    page.evaluate(DROP, ["#prompt", "paste", [["image.png", data]]])
    page.evaluate(DROP, ["#videos-title", "drop", [["the-rocket_2.png", data], ["car.png", data]]])
    labels = page.locator(".tile .label")

    def shown() -> list[str]:
        return [label.input_value() for label in labels.all()]

    expect(labels).to_have_count(3)
    assert shown() == ["", "rocket", "car"]  # as far as the files' names say
    labels.first.fill("flower")
    page.get_by_role("button", name="Move car forward").focus()
    page.keyboard.press("Enter")
    assert shown() == ["flower", "car", "rocket"]
    page.keyboard.press("Enter")  # the focus went along
    assert shown() == ["car", "flower", "rocket"]
    page.locator(".tile").nth(0).drag_to(page.locator(".tile").nth(2))
    assert shown() == ["flower", "rocket", "car"]
    page.get_by_role("button", name="Remove rocket").press("Enter")
    assert shown() == ["flower", "car"]
    expect(page.get_by_role("button", name="Remove car")).to_be_focused()


# ---- who may ask, and servers that go and come


def test_signing_in_and_out(start_server: Any, open_page: Open, tmp_path: Path) -> None:
    from conceptmaster.runtime.server.keys import new_key

    key = new_key("team", tmp_path / "keys")
    server = start_server("--api-key-file", str(tmp_path / "keys"), data=tmp_path / "jobs", api_key=key)
    page = open_page(server, expected="401")
    dialog = page.get_by_role("dialog", name="Sign in")
    assert violations(page) == []
    page.keyboard.press("Escape")  # there is no way around it
    page.get_by_label("API key").fill("cm-wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("this API key is not known")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#account")).to_contain_text("team")
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and key not in cookie["value"]
    page.get_by_label("What happens").fill("a ball rolls left")
    wait_until(sent(page, lambda: page.keyboard.press("Control+Enter")), "completed")
    page.get_by_role("button", name="Sign out").click()
    expect(dialog).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)


def test_whoever_is_faster_than_the_models_loses_nothing(empty: Any, open_page: Open) -> None:
    page = open_page(empty)
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    page.get_by_label("What happens").fill(PROMPT)
    page.set_input_files("#files", [FLOWER])
    page.evaluate(DROP, ["#composer", "drop", [["rocket.png", list(ROCKET.read_bytes())]]])
    page.wait_for_timeout(1000)  # a pause after which hints are given
    page.keyboard.press("Control+Enter")
    expect(page.locator("#send")).to_have_text("Sending…")
    page.keyboard.press("Control+Enter")  # it is asked for once
    expect(page.locator(".card")).to_have_count(0)
    for route in held:
        route.continue_()
    expect(page.locator("#pictures-error")).to_contain_text("what each picture shows")  # no name is in 1.png
    expect(page.get_by_label("Picture 2 shows")).to_have_value("rocket")
    page.get_by_label("Model").select_option("sprites")
    page.get_by_label("Picture 1 shows").fill("flower")
    wait_until(sent(page, lambda: page.keyboard.press("Control+Enter")), "completed")
    video = newest_video(empty)
    assert (video["prompt"], video["labels"]) == (PROMPT, ["flower", "rocket"])


def test_examples_whose_pictures_do_not_come_say_so(empty: Any, open_page: Open) -> None:
    page = open_page(empty, expected="ERR_FAILED")
    page.get_by_label("Model").select_option("sprites")
    page.route("**/example-*.png", lambda route: route.abort())
    page.get_by_label("What happens").fill("mine")
    for button in ("Make this video", "Fill in an example"):
        page.get_by_role("button", name=button).first.click()
        expect(page.locator("#form-error")).to_have_text("the server does not answer: try again in a moment")
        page.locator("#form-error").evaluate("node => node.textContent = ''")
    expect(page.get_by_label("What happens")).to_have_value("mine")  # nothing is lost, nothing sent
    expect(page.locator(".card")).to_have_count(0)


def test_a_server_that_is_killed_and_comes_back(start_server: Any, open_page: Open, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = ("--port", str(free.getsockname()[1]))
    server = start_server(*options, data=tmp_path / "jobs")
    page = open_page(server, expected="ERR_|Failed to load")
    page.get_by_label("What happens").fill("a ball rolls left")
    page.get_by_text("More options").click()
    page.get_by_label("Steps").fill("1000")
    page.get_by_label("How many").fill("8")  # seconds
    card = sent(page)
    wait_until(card, "in_progress")
    server.stop(signal.SIGKILL)
    expect(page.get_by_text("The server does not answer")).to_be_visible()
    expect(page.get_by_label("What happens")).to_have_value("a ball rolls left")  # nothing is lost
    start_server(*options, data=tmp_path / "jobs")
    expect(page.get_by_text("The server does not answer")).to_be_hidden()
    wait_until(card, "completed")


def test_an_open_page_does_not_keep_the_server(start_server: Any, open_page: Open) -> None:
    server = start_server()
    open_page(server, expected="ERR_")
    with _within(15):
        assert server.stop() == 0


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"this takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- for everybody


def test_by_keyboard_alone(empty: Any, open_page: Open) -> None:
    page = open_page(empty)

    def tab_to(text: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                "() => { const at = document.activeElement, style = getComputedStyle(at);"
                "  return [at.getAttribute('aria-label') ?? at.labels?.[0]?.textContent ?? at.textContent,"
                "    at === document.body ||"
                "      style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2]; }"
            )
            assert focused[1], f"the focus on {focused[0]!r} is not seen"
            if text in focused[0] and page.evaluate("document.activeElement !== document.body"):
                return
        raise AssertionError(f"{text!r} is not reached")

    tab_to("Model")
    page.keyboard.type("sprites")
    tab_to("Fill in an example")
    page.keyboard.press("Enter")
    expect(page.get_by_label("What happens")).to_have_value(PROMPT)
    tab_to("Remove rocket")
    page.keyboard.press("Enter")
    tab_to("What happens")
    page.keyboard.press("Control+A")
    page.keyboard.type("a flower ")
    tab_to("Motions")
    page.keyboard.press("Space")
    tab_to("falls down")
    page.keyboard.press("Enter")
    wait_until(sent(page, lambda: page.keyboard.press("Control+Enter")), "completed")
    tab_to("Open the video")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    tab_to("Delete")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "videos-title"


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_sizes_and_colours(sprites: Any, open_page: Open, viewport: dict[str, int], colours: str) -> None:
    page = open_page(
        sprites, viewport, color_scheme=colours, has_touch=viewport is PHONE, is_mobile=viewport is PHONE
    )
    page.get_by_label("Model").select_option("sprites")
    page.get_by_role("button", name="Fill in an example").click()
    expect(page.get_by_label("What happens")).to_have_value(PROMPT)
    page.get_by_label("What happens").fill("a flower and a dragon")
    page.get_by_role("button", name="Motions").click()
    page.get_by_text("More options").click()
    expect(page.locator("#hints li")).to_have_count(2)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 384) == (colours == "light")
    card = sent(page)
    wait_until(card, "completed")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    small = """all => all.filter(e => e.offsetParent && Math.min(e.offsetWidth, e.offsetHeight) < 24)
        .map(e => e.outerHTML)"""
    assert page.locator("button, a.button, input, select, textarea").evaluate_all(small) == []
    card.get_by_role("button", name="Open the video").click()
    assert violations(page) == []
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]


def test_less_motion_where_that_is_wanted(sprites: Any, open_page: Open) -> None:
    page = open_page(sprites)
    page.emulate_media(reduced_motion="reduce")
    fill(page, Steps="2")
    card = sent(page)
    wait_until(card, "completed")
    clip = card.locator("video").first
    expect(card.get_by_role("button", name="Play")).to_be_attached()
    assert clip.evaluate("clip => clip.paused && clip.currentTime === 0")
    card.get_by_role("button", name="Play").click()
    wait_until_it_plays(page, clip)
    card.get_by_role("button", name="Pause").click()
    assert clip.evaluate("clip => clip.paused")
