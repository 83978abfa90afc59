"""The page in a browser: the script runs under the page's policy, words are counted, loaded and saved."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.reasoning.annotate import export, take
from tests.prepare.reasoning.builders import a_walk, read_back, stored
from trainer.data.shards import Source

LIMIT_S = 60
Run = Callable[[str], Any]
"""JavaScript expression -> its value."""
WORDS = 'The city is what I have to say first, so I tap its "field" – 城市.'


class Browser:
    """A headless Chromium on loopback, asked by the DevTools protocol."""

    def __init__(self, folder: Path, page: Path):
        self.folder = folder
        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
        )
        command = [
            str(shutil.which("chromium")),
            *flags,
            f"--user-data-dir={folder}/profile",
            "--window-size=1300,1500",
        ]
        self.log = (folder / "chromium.log").open("wb")
        self.process = subprocess.Popen([*command, page.as_uri()], stdout=self.log, stderr=subprocess.STDOUT)
        self.number = 0
        try:
            self.socket = self._connected()
        except BaseException:
            self.process.kill()
            raise

    def _connected(self) -> Any:
        import websocket

        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            port = re.search(rb"ws://127.0.0.1:(\d+)/", (self.folder / "chromium.log").read_bytes())
            if port is None:
                time.sleep(0.2)
                continue
            with urllib.request.urlopen(f"http://127.0.0.1:{port[1].decode()}/json", timeout=5) as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page" and "index.html" in tab["url"]]
            if tabs:
                return websocket.create_connection(tabs[0]["webSocketDebuggerUrl"], timeout=LIMIT_S)
            time.sleep(0.2)
        raise AssertionError((self.folder / "chromium.log").read_text())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code: str) -> Any:
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            if found := self.run(code):
                return found
            time.sleep(0.1)
        raise AssertionError(f"never true: {code}")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source.open(stored(str(tmp_path), [a_walk("w0"), a_walk("w1", query="Find a hotel")]))


@contextlib.contextmanager
def opened(source: Source, folder: Path) -> Iterator[Browser]:
    """The exported page; skips where there is no browser."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")
    pytest.importorskip("websocket")
    export(source, str(folder / "out"), samples=10)
    found = Browser(folder, folder / "out" / "index.html")
    try:
        found.until("document.readyState === 'complete' && document.getElementById('count')?.textContent")
        yield found
    finally:
        found.close()


@pytest.fixture
def browser(source: Source, tmp_path: Path) -> Iterator[Browser]:
    with opened(source, tmp_path) as found:
        yield found


def saved(browser: Browser, folder: Path) -> Path:
    """What the page's button saves."""
    folder.mkdir()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.run("document.getElementById('save').click()")
    until = time.monotonic() + LIMIT_S
    while not (folder / "answers.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    return folder / "answers.jsonl"


@pytest.mark.slow
def test_words_written_on_the_page_are_saved_and_taken_into_shards(browser: Browser, source: Source, tmp_path: Path):
    assert browser.run("document.querySelectorAll('textarea').length") == 8
    assert browser.run("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    browser.run(f"document.querySelector('textarea').value = {json.dumps(WORDS)}")
    browser.run("document.querySelector('textarea').dispatchEvent(new Event('input'))")
    assert browser.run("document.getElementById('count').textContent") == (
        "1 of 8 steps have words, 1 changed here, not saved"
    )
    found = take(source, str(saved(browser, tmp_path / "saved")), str(tmp_path / "new"))
    assert found["made"]["steps written"] == 1 and found["made"]["steps not answered"] == 7
    assert read_back(str(tmp_path / "new"))[0][0].messages[1].parts[0].text == f"{WORDS}\n"  # type: ignore[union-attr]


@pytest.mark.slow
def test_words_that_are_emptied_on_the_page_are_taken_away_and_stay_so_when_it_is_loaded(tmp_path: Path):
    source = Source.open(stored(str(tmp_path), [a_walk("w0", words=(WORDS, WORDS))]))
    type_into = "(number, text) => { const one = document.querySelectorAll('textarea')[number]; one.value = text; "
    type_into += "one.dispatchEvent(new Event('input')); }"
    with opened(source, tmp_path) as browser:
        browser.run(f"({type_into})(1, '')")
        told = browser.run("document.querySelectorAll('.words')[1].textContent")
        path = saved(browser, tmp_path / "saved")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["reasoning"] for line in lines] == [WORDS, None, "", ""] and told == "the words are taken away"
        browser.run(f"({type_into})(1, 'other words')")
        load = "document.getElementById('load')"
        browser.run(f"const files = new DataTransfer(); files.items.add(new File([{json.dumps(path.read_text())}], "
                    f"'a')); {load}.files = files.files; {load}.dispatchEvent(new Event('change'))")  # fmt: skip
        browser.until("document.getElementById('count').textContent.includes('loaded 4 lines, 0 belong')")
        shown = browser.run("[...document.querySelectorAll('textarea')].map((one) => one.value)")
        assert shown == [WORDS, "", "", ""]
    found = take(source, str(path), str(tmp_path / "new"))
    assert found["made"]["steps whose words were taken away"] == 1 and found["made"]["steps unchanged"] == 1


@pytest.mark.slow
def test_saved_words_are_loaded_again_and_steps_that_have_some_can_be_hidden(browser: Browser, tmp_path: Path):
    lines = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    lines = [{**lines[0], "reasoning": WORDS}, {**lines[1], "digest": "0"}, None]
    text = json.dumps("\n".join(map(json.dumps, lines)))
    load = "document.getElementById('load')"
    browser.run(f"const files = new DataTransfer(); files.items.add(new File([{text}], 'a.jsonl')); "
                f"{load}.files = files.files; {load}.dispatchEvent(new Event('change'))")  # fmt: skip
    browser.until("document.getElementById('count').textContent.includes('loaded 1 lines, 2 belong to no step here')")
    assert browser.run("document.querySelector('textarea').value") == WORDS
    browser.run("document.getElementById('open').click()")
    shown = "[...document.querySelectorAll('.step')].filter((one) => one.offsetParent !== null).length"
    assert browser.run(shown) == 7


@pytest.mark.slow
def test_no_other_script_runs_on_the_page(browser: Browser):
    browser.run("const own = document.createElement('script'); own.textContent = 'window.ran = 1'; "
                "document.body.append(own)")  # fmt: skip
    assert browser.run("window.ran === undefined")
