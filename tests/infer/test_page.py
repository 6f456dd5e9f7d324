"""The page, in a real browser: a message, the answer as it comes, a file, the strip, a reload, a phone, the keyboard.

With MEGACONTEXT_SCREENSHOTS=FOLDER pictures of it are left there.
"""

import os
from pathlib import Path

import pytest

from tests.infer import browser, web

pytestmark = pytest.mark.skipif(not browser.FOUND, reason="chromium is not installed")

MESSAGES = "[...document.querySelectorAll('#log .message')].map(e => e.textContent)"
BARS = "[...document.querySelectorAll('#band div')].map(e => e.dataset.level + ' ' + e.style.width).join()"
IDLE = "document.getElementById('stop').hidden"


@pytest.fixture
def page(tmp_path, monkeypatch):
    """(browser, client, server), the page open and slow enough to be watched."""
    web.slowly(monkeypatch, 0.03)
    with (
        web.serving(web.letters(), options=web.READABLE) as (client, server),
        browser.Browser(tmp_path / "profile") as window,
    ):
        window.look()
        window.open(str(client.base_url))
        yield window, client, server
        assert not window.errors


def picture(window: browser.Browser, name: str) -> None:
    if folder := os.environ.get("MEGACONTEXT_SCREENSHOTS"):
        window.screenshot(Path(folder) / f"{name}.png")


def send(window: browser.Browser, text: str) -> None:
    window.run("document.getElementById('text').focus()")
    window.type(text)
    window.press("Enter")


def test_a_conversation_in_a_browser(page, tmp_path):
    window, _, _ = page
    send(window, "Who lives in Riga?")
    window.until(f"{MESSAGES}.length === 2 && !{IDLE}")  # it answers
    begun = window.until(f"{MESSAGES}[1]")
    window.until(IDLE)
    assert len(window.run(MESSAGES)[1]) > len(begun)
    assert window.run(MESSAGES)[0] == "Who lives in Riga?"
    assert "per token" in window.until("document.getElementById('speed').textContent")

    before = window.run(BARS)
    book = tmp_path / "Riga.txt"
    book.write_text("Anna lives in Riga, a town by the sea. <b>Janis</b> does not.\n" * 250)
    window.drop(book)
    window.until("document.querySelector('.document')?.textContent.includes('read in')")
    window.until(IDLE)
    after = window.run(BARS)
    assert after != before
    assert len({bar.split()[0] for bar in after.split(",")}) > 2  # levels of detail
    assert window.run("document.getElementById('drop').hidden")

    send(window, "And where is Janis?")
    window.until(f"{MESSAGES}.length === 4 && !{IDLE}")
    window.until(f"{BARS} !== '{after}'")  # it moves while the answer streams
    picture(window, "light")
    window.look(dark=True)
    picture(window, "dark")
    window.until(IDLE)

    shown = [text.strip() for text in window.run(MESSAGES)]
    window.look(width=390, height=780)
    window.reload()
    window.until(f"{MESSAGES}.length === 4")
    assert [text.strip() for text in window.run(MESSAGES)] == shown
    assert "Riga.txt" in window.run("document.querySelector('.document').textContent")
    assert window.until("document.querySelectorAll('#band div').length") > 2
    assert window.run("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out

    window.run("document.getElementById('band').focus()")
    window.press("End")
    assert "word for word" in window.run("document.getElementById('detail').textContent")
    for _ in range(3):
        window.press("ArrowLeft")
    assert "gist" in window.run("document.getElementById('detail').textContent")
    picture(window, "phone")

    send(window, "Who was it?")  # the conversation goes on
    window.until(f"{MESSAGES}.length === 6 && {IDLE}")
    assert [text.strip() for text in window.run(MESSAGES)][:4] == shown

    send(window, "/clear")
    window.until("document.getElementById('memory').hidden")
    assert window.run(MESSAGES) == []


def test_stop_and_commands_in_a_browser(page):
    window, _, server = page
    send(window, "/temperature 0.1")
    send(window, "/topk 500")
    send(window, "/nothing")
    notes = "[...document.querySelectorAll('.note, .error')].map(e => e.textContent)"
    assert window.run(notes)[1] == "/temperature is 0.1."
    assert "whole number from 0 to 200" in window.run(notes)[2]
    assert "There is no command /nothing" in window.run(notes)[3]

    window.run("document.getElementById('text').focus()")
    window.type("one")
    window.press("Enter", shift=True)
    window.type("two")
    window.press("Enter")
    window.until(f"!{IDLE} && {MESSAGES}[1]")
    window.run("document.getElementById('stop').click()")
    window.until(IDLE)
    web.until(lambda: server.scheduler.counts == (0, 0))
    assert window.run(MESSAGES)[0] == "one\ntwo"
    assert window.run(notes)[-1] == "Stopped."
