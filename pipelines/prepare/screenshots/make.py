"""Makes the committed screenshots: real pages in a real browser, with the boxes of what can be clicked.

    apt-get install chromium chromium-driver
    python pipelines/prepare/screenshots/make.py        (needs the extras prepare and train; about two minutes)

Pages: the MLflow UI with a few runs, Python's documentation browser (pydoc), and a site that mkdocs-material builds
from package READMEs. The script walks: it takes a screenshot, clicks or types, takes the next; a walk becomes one
trajectory.
Writes NAME.png (palette) and screens.json beside this file: {"screens": [{file, site, url, width, height, elements}],
"walks": [{site, goal, steps: [{screen, action, element, text}]}]}. Boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
WIDTH, HEIGHT = 640, 480
SITES = {
    "pydoc": "PSF-2.0 (Python's documentation)",
    "docs": "MIT (mkdocs-material) and the packages' own (README texts)",
    "mlflow": "Apache-2.0 (MLflow)",
}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    f"--window-size={WIDTH},{HEIGHT}", "--force-device-scale-factor=1",
)  # fmt: skip
# pydoc's pages name the machine's kernel and every folder on the path: neither belongs into a picture.
PYDOC = """
import platform, sys
platform.platform = lambda *_, **__: "Linux"
import pydoc
sys.path[:] = [path for path in sys.path if "lib/python" in path and "site-packages" not in path]
sys.argv = ["pydoc", "-n", "127.0.0.1", "-p", "8102"]
pydoc.cli()
"""
ELEMENTS = """
const found = [];
const seen = new Set();
const clickable = 'a[href], button, input, label[for], [role=button], [role=tab], [role=menuitem]';
for (const e of document.querySelectorAll(clickable)) {
  if (e.tagName === 'A' && e.origin !== location.origin) continue;  // other sites cannot be reached
  const r = e.getBoundingClientRect();
  const box = [Math.max(0, r.left), Math.max(0, r.top), Math.min(innerWidth, r.right), Math.min(innerHeight, r.bottom)];
  if (box[2] - box[0] < 8 || box[3] - box[1] < 8) continue;
  const top = document.elementFromPoint((box[0] + box[2]) / 2, (box[1] + box[3]) / 2);
  if (!top || !(e.contains(top) || top.contains(e))) continue;
  const target = e.htmlFor && e.htmlFor.replace(/_/g, '');
  const names = [e.innerText, e.getAttribute('aria-label'), e.placeholder, e.title, target];
  const text = (names.find(Boolean) || '').trim().split('\\n')[0];
  if (!text || text.length > 32 || seen.has(text)) continue;
  seen.add(text);
  const tag = e.tagName.toLowerCase();
  const role = tag === 'a' ? 'link' : tag === 'input' ? 'input' : 'button';
  found.push({role, text, box: box.map(v => Math.round(v))});
}
return found;
"""


class Browser:
    """The few WebDriver calls that the walks need (W3C WebDriver over HTTP)."""

    def __init__(self, port: int):
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": list(FLAGS), "binary": shutil.which("chromium")}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = self._call("POST", "/session", wanted)["sessionId"]
        # The window's size includes the browser's frame: make the page itself WIDTH x HEIGHT.
        inner = self.run("return [innerWidth, innerHeight]")
        size = {"width": 2 * WIDTH - inner[0], "height": 2 * HEIGHT - inner[1]}
        self._call("POST", f"/session/{self.session}/window/rect", size)

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def run(self, script: str) -> Any:
        return self._call("POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []})

    def open(self, url: str, wait_s: float) -> None:
        self._call("POST", f"/session/{self.session}/url", {"url": url})
        time.sleep(wait_s)

    def click(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": int(x), "y": int(y), "origin": "viewport"}
        press = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": press}
        self._call("POST", f"/session/{self.session}/actions", {"actions": [mouse]})

    def type(self, text: str) -> None:
        keys = [{"type": kind, "value": char} for char in text for kind in ("keyDown", "keyUp")]
        self._call(
            "POST", f"/session/{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]}
        )

    def screenshot(self) -> Image.Image:
        data = base64.b64decode(self._call("GET", f"/session/{self.session}/screenshot"))
        return Image.open(io.BytesIO(data)).convert("RGB")

    def close(self) -> None:
        self._call("DELETE", f"/session/{self.session}")


class Walks:
    def __init__(self, browser: Browser):
        self.browser, self.screens, self.walks = browser, [], []
        self.seen: dict[bytes, int] = {}

    def look(self, site: str) -> int:
        """Take a screenshot; returns its number: an earlier one's when nothing looks different."""
        picture = self.browser.screenshot()
        if picture.tobytes() in self.seen:
            return self.seen[picture.tobytes()]
        number = self.seen[picture.tobytes()] = len(self.screens)
        name = f"{site}-{number:02d}.png"
        picture.quantize(64, dither=Image.Dither.NONE).save(HERE / name, optimize=True)
        path = re.sub(r"^https?://[^/]+", "", str(self.browser.run("return location.href")))
        elements = self.browser.run(ELEMENTS)
        self.screens.append(
            {
                "file": name,
                "site": site,
                "url": path,
                "width": picture.width,
                "height": picture.height,
                "elements": elements,
            }
        )
        return number

    def walk(
        self, site: str, url: str, rng: random.Random, *, clicks: int, wait_s: float, words: tuple[str, ...]
    ) -> None:
        """Open a page, then click on (or type into) elements that can be seen."""
        self.browser.open(url, wait_s)
        steps, at = [], self.look(site)
        for _ in range(clicks):
            elements = self.screens[at]["elements"]
            choices = [number for number, item in enumerate(elements) if item["box"][1] < HEIGHT - 12]
            if not choices:
                break
            number = rng.choice(choices)
            chosen = elements[number]
            left, top, right, bottom = chosen["box"]
            self.browser.click((left + right) / 2, (top + bottom) / 2)
            time.sleep(wait_s)
            before, at = at, self.look(site)
            if at == before and chosen["role"] != "input":
                continue  # a click that changes nothing teaches nothing
            steps.append({"screen": before, "action": "left_click", "element": number})
            if chosen["role"] == "input":
                word = rng.choice(words)
                self.browser.type(word)
                time.sleep(wait_s)
                steps.append({"screen": at, "action": "type", "text": word})
                at = self.look(site)
        if steps:
            steps.append({"screen": at, "action": "terminate", "text": "success"})
            self.walks.append({"site": site, "steps": steps})


@contextlib.contextmanager
def serving(*command: str, port: int, wait_s: float = 60.0, folder: str | None = None) -> Iterator[str]:
    """Run a server until the block ends; yields its address."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, stdin=subprocess.PIPE, cwd=folder)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def build_docs(folder: Path) -> None:
    """A documentation site from READMEs of packages."""
    docs = folder / "docs"
    docs.mkdir()
    packages = ("numpy", "pillow", "scikit-learn", "tokenizers", "pydantic", "safetensors", "click", "fsspec")
    for package in packages:
        readme: Any = metadata.metadata(package)
        text = str(readme.get_payload())
        text = re.sub(r"!?\[!\[[^\n]*|<[^>]*>|!\[[^\n]*|^\[?https?:.*$|^\.\. .*$|^ +:.*$", "", text, flags=re.MULTILINE)
        (docs / f"{package}.md").write_text(f"# {package}\n\n{text}")
    (docs / "index.md").write_text("# Packages\n\n" + "\n".join(f"- [{name}]({name}.md)" for name in packages) + "\n")
    (folder / "mkdocs.yml").write_text(
        "site_name: Packages\ntheme:\n  name: material\n  font: false\nplugins: [search]\n"
    )
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q"], cwd=folder, check=True)


def fill_mlflow(uri: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    for experiment in ("tiny", "captions"):
        mlflow.set_experiment(experiment)
        for stage, lr in (("stage1", 1e-3), ("stage2", 5e-4), ("sft", 1e-4)):
            with mlflow.start_run(run_name=stage):
                mlflow.log_params({"lr": lr, "packing.length": 512})
                for step in range(20):
                    mlflow.log_metric("loss", 4.0 / (1 + step * lr * 100), step=step)


def main() -> None:
    for old in HERE.glob("*.png"):
        old.unlink()
    rng = random.Random(7)
    words = ("array", "image", "install", "loss", "read", "test")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        build_docs(scratch)
        stack.enter_context(serving(shutil.which("chromedriver") or "chromedriver", "--port=9515", port=9515))
        browser = Browser(9515)
        stack.callback(browser.close)
        walks = Walks(browser)
        site = ("-m", "http.server", "8101", "--bind", "127.0.0.1", "--directory", str(scratch / "site"))
        with serving(sys.executable, *site, port=8101) as url:
            for page in ("", "numpy/", "pillow/", "pydantic/", "click/", "tokenizers/", "safetensors/", "fsspec/"):
                walks.walk("docs", f"{url}/{page}", rng, clicks=3, wait_s=1.2, words=words)
        with serving(sys.executable, "-c", PYDOC, port=8102, folder=str(scratch)) as url:
            for page in ("", "json.html", "random.html", "pathlib.html", "topics.html", "wave.html"):
                walks.walk("pydoc", f"{url}/{page}", rng, clicks=1, wait_s=0.7, words=words)
        store = f"sqlite:///{scratch}/mlflow.db"
        fill_mlflow(store)
        command = ("-m", "mlflow", "server", "--port", "8103", "--backend-store-uri", store, "--workers", "1")
        with serving(sys.executable, *command, port=8103) as url:
            for page in ("", "#/experiments", "#/experiments/1", "#/experiments/2", "#/models"):
                walks.walk("mlflow", f"{url}/{page}", rng, clicks=2, wait_s=4.0, words=words)
    found = {"licences": SITES, "screens": walks.screens, "walks": walks.walks}
    (HERE / "screens.json").write_text(json.dumps(found, indent=1) + "\n")
    size = sum(path.stat().st_size for path in HERE.glob("*.png"))
    print(f"{len(walks.screens)} screenshots, {size / 1e6:.2f} MB, {len(walks.walks)} walks")


if __name__ == "__main__":
    main()
