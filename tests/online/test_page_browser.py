"""The page in a real browser, against a real server with the real small model. Skipped where there is no Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from utils.browser import Browser, Page, find_chromium, running_browser
from utils.http_server import RunningServer, running_server

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine: install it, or name it in CHROMIUM"
)

_MARKUP = "<img src=x onerror=hacked()><script>hacked()</script><a href='javascript:hacked()'>x</a>"
_NO_SCROLL = "document.documentElement.scrollWidth <= window.innerWidth"
# The next Tab goes to the first place of the page.
_FROM_THE_START = (
    "(() => { const mark = document.createElement('i'); mark.tabIndex = -1; document.body.prepend(mark); mark.focus();"
    " mark.remove(); })()"
)
_IDLE = "document.getElementById('stop').hidden"
# The lowest contrast of visible words against what lies under them: [ratio, words, colours].
_CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((one, at) => one * a + under[at] * (1 - a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return (colour[3] ?? 1) === 1 ? colour.slice(0, 3) : over(colour, ground(node.parentElement));
  };
  let worst = [21, ""];
  const look = (node, colour, words) => {
    const under = ground(node);
    const [a, b] = [light(over(parse(colour), under)), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, words, colour, under];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && node.checkVisibility() && !node.closest(':disabled'))
      look(node, getComputedStyle(node).color, walker.currentNode.data.trim());
  }
  for (const node of document.querySelectorAll('input, textarea'))
    if (node.checkVisibility()) look(node, getComputedStyle(node, '::placeholder').color, node.id);
  return worst;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def server(real_model: Path) -> Iterator[RunningServer]:
    with running_server(real_model, num_blocks=512, max_num_seqs=4) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with browser.page() as tab:
        tab.open(f"{server.url}/")
        choose(tab, temperature="0", seed="1")
        yield tab
    server.wait_until_idle()  # a tab that was closed leaves nothing behind


def choose(page: Page, **settings: str) -> None:
    """Fills in fields of the settings."""
    for name, value in settings.items():
        page.run(f"document.getElementById('setting-{name}').value = {json.dumps(value)}")


def say(page: Page, text: str) -> None:
    page.run("document.getElementById('message').focus()")
    page.type(text)
    page.press("Enter")


def ask(page: Page, text: str) -> str:
    """Sends a message and gives the whole answer."""
    say(page, text)
    page.wait_for(_IDLE)
    return answer_text(page)


def answer_text(page: Page) -> str:
    return str(page.run("[...document.querySelectorAll('.assistant .text')].at(-1).innerText"))


def figures(page: Page) -> str:
    return str(page.run("[...document.querySelectorAll('.figures')].at(-1).textContent"))


def event(delta: dict[str, Any], finish: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"


def test_page_when_opened_then_nothing_goes_wrong_and_nobody_else_is_asked(page: Page, server: RunningServer) -> None:
    page.wait_for("document.getElementById('engine-says').textContent.startsWith('Idle')")
    assert page.problems == []
    assert {url.split("/")[2] for url in page.urls} == {server.url.removeprefix("http://")}
    assert page.run("document.title") == f"{page.run('document.getElementById(`model-name`).textContent')} · Pellucid"
    assert page.run("document.getElementById('health').textContent") == "ready"


def test_message_when_sent_then_the_answer_grows_and_its_figures_are_told(page: Page) -> None:
    choose(page, max_tokens="200")
    page.run(
        "window.sizes = new Set(); new MutationObserver(() => sizes.add(document.querySelector('.text')?.innerText.length))"
        ".observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true})"
    )
    text = ask(page, "Tell me a story about a lighthouse.")
    assert len(text) > 200
    assert page.run("sizes.size") > 5, "the answer came at once"
    told = figures(page)
    assert " prompt · 200 tokens · " in told
    assert " tokens/s · first after " in told
    assert told.endswith("cut at its length")
    page.wait_for("document.getElementById('announcer').textContent.length > 0")
    assert page.problems == []


def test_answer_when_stopped_with_escape_then_the_request_ends_in_the_engine(page: Page, server: RunningServer) -> None:
    choose(page, max_tokens="4000")
    say(page, "Tell me a story about a lighthouse.")
    page.wait_for("document.querySelector('.text')?.innerText.length > 40")
    assert server.used_blocks() > 0
    page.press("Escape")
    page.wait_for(_IDLE)
    server.wait_until_idle()
    assert figures(page).endswith("stopped")
    length = len(answer_text(page))
    assert length > 40
    page.run("new Promise((resolve) => setTimeout(resolve, 300))")
    assert len(answer_text(page)) == length


def test_keyboard_alone_when_used_then_everything_is_reached_seen_and_done(
    browser: Browser, server: RunningServer
) -> None:
    with browser.page() as page:
        page.open(f"{server.url}/")
        page.run(_FROM_THE_START)
        reached = []
        for _ in range(40):
            page.press("Tab")
            reached.append(page.focused())
            assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none", reached[-1]
            if reached[-1] == "kv-chart":
                break
        wanted = ["Skip to the message box", "new-chat", "open-settings", "log", "message", "send", "burst", "pause"]
        wanted += ["zoom-out", "zoom-in", "timeline", "Steps as a table", "rate-chart", "kv-chart"]
        assert [name for name in reached if name in wanted] == wanted
        page.run("document.getElementById('open-settings').focus()")
        page.press("Enter")
        page.wait_for("document.getElementById('settings').open")
        page.run("document.getElementById('setting-max_tokens').select()")
        page.type("5")
        page.press("Escape")
        page.wait_for("!document.getElementById('settings').open")
        assert page.focused() == "open-settings"
        for _ in range(5):  # the conversation, three suggestions, the message
            page.press("Tab")
        assert page.focused() == "message"
        ask(page, "Hi!")
        assert "5 tokens" in figures(page)
        page.run("document.getElementById('timeline').focus()")
        page.wait_for("document.getElementById('tile-step').textContent !== '–'")
        page.press("ArrowLeft")
        assert page.run("document.querySelector('#timeline [role=status]').textContent").startswith("Step ")
        page.press("Escape")
        assert page.run("document.querySelector('#timeline .tip').hidden")
        assert page.problems == []


def test_phone_of_360_pixels_when_used_then_nothing_has_to_be_scrolled_sideways(
    browser: Browser, server: RunningServer
) -> None:
    with browser.page(width=360, height=740) as page:
        page.open(f"{server.url}/")
        choose(page, max_tokens="60")
        assert page.run(_NO_SCROLL)
        ask(page, "a" * 120)
        assert page.run(_NO_SCROLL)
        page.click("#to-engine")
        page.wait_for("document.getElementById('tile-step').textContent !== '–'")
        assert page.run(_NO_SCROLL)
        assert page.run("getComputedStyle(document.getElementById('chat')).display") == "none"
        page.run("document.getElementById('steps-details').open = true")
        assert page.run(_NO_SCROLL)
        page.click("#to-chat")
        page.wait_for("getComputedStyle(document.getElementById('chat')).display !== 'none'")
        page.click("#open-settings")
        page.wait_for("document.getElementById('settings').open")
        assert page.run("document.querySelector('#settings').scrollWidth") <= 360
        assert page.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scheme_when_chosen_then_the_page_follows_and_all_words_can_be_read(
    browser: Browser, server: RunningServer, scheme: str
) -> None:
    with browser.page(scheme=scheme) as page:
        page.open(f"{server.url}/")
        choose(page, max_tokens="8")
        assert page.run(_CONTRAST)[0] >= 4.5
        ask(page, "Hi!")
        choose(page, temperature="-1")
        ask(page, "Hi again!")  # an error
        page.run("document.getElementById('steps-details').open = true")
        ground = page.run("getComputedStyle(document.body).backgroundColor.match(/[\\d]+/g).map(Number)")
        assert (max(ground) < 60) == (scheme == "dark")
        assert page.run(_CONTRAST)[0] >= 4.5, page.run(_CONTRAST)
        page.click("#open-settings")
        assert page.run(_CONTRAST)[0] >= 4.5, page.run(_CONTRAST)


_REMEMBER = """
window.seen = [];
setInterval(() => {
  const text = (id) => document.getElementById(id).textContent;
  seen.push({running: text('tile-running'), queue: text('queue'), says: text('engine-says'), rate: text('tile-rate')});
}, 20);
"""


def test_live_view_when_requests_run_then_it_shows_their_steps_and_who_waits(page: Page) -> None:
    page.run(_REMEMBER)  # what it shows for a moment only, a slow machine may not be asked for in time
    page.click("#burst")
    page.wait_for("seen.some(({running}) => running === '4')")
    page.wait_for("seen.some(({queue}) => queue.includes('max_num_seqs 4 reached'))")
    page.wait_for("seen.some(({says}) => says.includes('waiting'))")
    page.wait_for("seen.some(({rate}) => Number(rate) > 0)")
    page.run("document.getElementById('steps-details').open = true")
    page.wait_for("document.querySelectorAll('#steps-body tr').length > 3")
    assert "decode" in page.run("document.getElementById('steps-body').textContent")
    page.wait_for("document.getElementById('burst').textContent === 'Send 8 at once'")
    page.wait_for("document.getElementById('tile-waiting').textContent === '0'")
    page.wait_for("document.getElementById('kv-figure').textContent.startsWith('0 in use · ')")
    colours = page.run(
        """(() => {
          const canvas = document.querySelector('#timeline canvas');
          const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const seen = {};
          for (let at = 0; at < data.length; at += 4)
            if (data[at + 3] === 255) seen[[data[at], data[at + 1], data[at + 2]]] = true;
          return Object.keys(seen);
        })()"""
    )
    assert {"13,116,128", "199,107,0"} <= set(colours), "decode and prefill are not drawn"
    assert page.problems == []


def test_live_view_when_nobody_looks_then_the_engine_is_left_alone(page: Page) -> None:
    def asked() -> int:
        page.run("new Promise((resolve) => setTimeout(resolve, 900))")
        return sum("/debug/live" in url for url in page.urls)

    hide = "Object.defineProperty(document, 'visibilityState', {value: %r, configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    assert asked() < asked()
    for begin, end in (
        (hide % "hidden", hide % "visible"),
        ("document.getElementById('pause').click()", "document.getElementById('pause').click()"),
    ):
        page.run(begin)
        page.run("new Promise((resolve) => setTimeout(resolve, 300))")
        count = asked()
        assert asked() == count
        page.run(end)
        page.wait_for("document.getElementById('engine-says').textContent.startsWith('Idle')")
        assert asked() > count


def test_markup_when_a_model_or_a_person_writes_it_then_it_stays_text(browser: Browser, real_model: Path) -> None:
    with running_server(real_model, num_blocks=64, served_model_name=(_MARKUP,)) as server, browser.page() as page:
        page.answer(
            "/v1/chat/completions",
            event({"role": "assistant", "reasoning_content": f"hm {_MARKUP}"})
            + "".join(event({"content": part}) for part in (_MARKUP[:30], _MARKUP[30:]))
            + event(
                {
                    "content": f"\n\n# {_MARKUP}\n\n- **{_MARKUP}**\n\n```html\n{_MARKUP}\n```\n\n[x](javascript:hacked())"
                }
            )
            + event({}, "stop")
            + "data: [DONE]\n\n",
        )
        page.open(f"{server.url}/")
        page.run("window.hacked = () => (window.wasHacked = true)")
        text = ask(page, _MARKUP)
        assert text.count("onerror=hacked()") == 4
        assert "[x](javascript:hacked())" in text
        assert page.run("document.querySelector('.said').textContent") == _MARKUP
        assert page.run("document.querySelector('.thoughts').textContent") == f"hm {_MARKUP}"
        assert page.run("document.querySelector('.reasoning').open") is False
        assert page.run("document.getElementById('model-name').textContent") == _MARKUP
        strange = (
            "document.querySelectorAll('#log img, #log script, #log a, .bar p img, .bar script, select img').length"
        )
        assert page.run(strange) == 0
        assert page.run("document.querySelector('.text h3, .text strong, .text pre code') !== null")
        assert page.run("window.wasHacked") is None
        assert page.problems == []


def test_keys_when_the_server_has_some_then_they_are_asked_for_and_stay_in_the_tab(
    browser: Browser, real_model: Path
) -> None:
    with (
        running_server(real_model, num_blocks=64, api_key=("key",), admin_key="boss") as server,
        browser.page() as page,
    ):
        page.open(f"{server.url}/")
        page.wait_for("document.getElementById('key-dialog').open")
        for key in ("wrong", "key"):
            page.run("document.getElementById('api-key').focus()")
            page.type(key)
            page.press("Enter")
            page.wait_for(
                "document.getElementById('key-why').textContent.includes('does not know')"
                if key == "wrong"
                else "!document.getElementById('key-dialog').open"
            )
        page.wait_for("!document.getElementById('admin-form').hidden")
        assert "admin key" in page.run("document.getElementById('admin-why').textContent")
        page.run("document.getElementById('admin-key').focus()")
        page.type("boss")
        page.press("Enter")
        page.wait_for("document.getElementById('admin-form').hidden")
        choose(page, max_tokens="4")
        assert ask(page, "Hi!")
        assert page.run("localStorage.length") == 0
        assert page.run("document.cookie") == ""
        assert not any("key" in url.split("/", 3)[3] or "boss" in url for url in page.urls)


def test_conversation_when_changed_then_it_goes_on_from_there(page: Page) -> None:
    choose(page, max_tokens="6")
    first = ask(page, "Hello there!")
    ask(page, "And what now?")
    page.run("[...document.querySelectorAll('.again')].at(-1).click()")
    page.wait_for(_IDLE)
    assert page.run("document.querySelectorAll('.message').length") == 4
    page.run("[...document.querySelectorAll('.user button')].find((one) => one.textContent === 'Edit').click()")
    page.run("document.activeElement.select()")
    page.type("Hello there!")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('.message').length === 2")
    page.wait_for(_IDLE)
    assert answer_text(page) == first, "greedy: the same question has the same answer"
    page.call("Page.reload")
    page.wait_for("document.getElementById('is-ready') !== null && document.querySelectorAll('.message').length === 2")
    assert answer_text(page) == first
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('.message').length") == 0
    assert page.problems == []


def test_settings_when_filled_in_then_the_request_carries_them(page: Page) -> None:
    choose(page, max_tokens="12", stop="\\n\n.", system="You are a pirate.", top_p="0.9", top_k="5", min_p="0.1")
    choose(page, presence_penalty="0.5", frequency_penalty="0.5", repetition_penalty="1.1", seed="7")
    page.run(
        "window.sent = []; const real = fetch; window.fetch = (path, options) => (sent.push(options.body), real(path, options))"
    )
    ask(page, "Hello!")
    sent = json.loads(page.run("sent.filter(Boolean).at(-1)"))
    assert sent["messages"] == [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Hello!"},
    ]
    wanted = {"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 12, "seed": 7}
    wanted |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "stop": ["\n", "."]}
    assert {name: sent[name] for name in wanted} == wanted


def test_errors_when_they_come_then_they_are_told_in_words(page: Page, server: RunningServer) -> None:
    choose(page, temperature="200")
    ask(page, "Hi!")
    problem = "[...document.querySelectorAll('.problem')].at(-1).textContent"
    assert "temperature is 200" in page.run(problem)
    assert page.run("[...document.querySelectorAll('.again')].at(-1).textContent") == "Try again"
    choose(page, temperature="0", max_tokens="4")
    page.answer("/v1/chat/completions", event({"content": "Half an ans"}))
    ask(page, "Hi!")
    assert "The connection broke" in page.run(problem)
    assert answer_text(page) == "Half an ans"
    failed = json.dumps({"error": {"message": "a step failed", "type": "server_error", "param": None, "code": None}})
    page.answer("/v1/chat/completions", f"{event({'content': 'Half'})}data: {failed}\n\ndata: [DONE]\n\n")
    ask(page, "Hi!")
    assert page.run(problem) == "The engine could not finish this: a step failed"
