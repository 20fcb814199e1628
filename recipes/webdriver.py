"""A headless Chromium by the standard library alone, over the WebDriver protocol: JSON over HTTP to
chromedriver, https://www.w3.org/TR/webdriver2. On Debian: apt-get install chromium chromium-driver.

    with browser(512, 512, pixels=64) as page:
        page.open("file:///tmp/form.html")
        page.screenshot().save("form.png")          # 64 x 64 pixels
        page.click(256, 448)                        # in CSS pixels, of which there are 512 x 512
"""
import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import tempfile

from PIL import Image

from lib.cli import UserError

OPTIONS = ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-smooth-scrolling")


@contextlib.contextmanager
def browser(width: int, height: int, pixels: int = 0):
    """A window of this size in CSS pixels. pixels: the width of its screenshots; 0: the same. The
    browser and its driver end with the block, also by Ctrl-C. Raises UserError."""
    if not shutil.which("chromedriver"):
        raise UserError("no chromedriver on the PATH: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # In a session of its own, so that Ctrl-C does not end the driver before the browser.
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.DEVNULL, start_new_session=True,
                                  env=os.environ | {"TMPDIR": folder})
        port = None
        try:
            said = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            ready = next(filter(None, said), None)
            if not ready:
                raise UserError("chromedriver ended before it was ready; run alone, it says why")
            port = int(ready[1])
            yield Page(port, width, height, (pixels or width) / width)
        finally:
            if port:                # a new connection: Ctrl-C may come in the middle of a command
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", port)
                    connection.request("GET", "/shutdown")
                    connection.getresponse().read()
            driver.terminate()
            driver.wait()
            driver.stdout.close()


class Page:
    """What one window of the browser shows."""

    def __init__(self, port: int, width: int, height: int, ratio: float):
        # An emulated screen has any size; a window has a least one, and bars that a page can't use.
        screen = {"width": width, "height": height, "pixelRatio": ratio, "mobile": False,
                  "touch": False}
        options = {"args": OPTIONS, "mobileEmulation": {"deviceMetrics": screen}}
        self.connection, self.session = http.client.HTTPConnection("127.0.0.1", port), "/session"
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.session += "/" + self.command("POST", "", capabilities=wanted)["sessionId"]
        self.width, self.height = width, height

    def command(self, method: str, path: str, **body):
        """One command of the protocol -> the value of its answer. Raises UserError."""
        text = json.dumps(body) if method == "POST" else None
        self.connection.request(method, self.session + path, text)
        value = json.loads(self.connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise UserError(f"Chromium: {value['message'].splitlines()[0]}")
        return value

    def open(self, url: str):
        """Go to an address, and wait until its scripts have run: on a busy machine the protocol's
        command may return before."""
        self.command("POST", "/url", url=url)
        self.run("return document.readyState === 'complete' || "
                 "new Promise(done => addEventListener('load', () => done()))")

    @property
    def title(self) -> str:
        """Read by a script, since the protocol's own command may give the title of before."""
        return self.run("return document.title")

    def screenshot(self) -> Image.Image:
        data = base64.b64decode(self.command("GET", "/screenshot"))
        return Image.open(io.BytesIO(data)).convert("RGB")

    def run(self, script: str):
        """Run JavaScript on the page -> the value that it returns."""
        return self.command("POST", "/execute/sync", script=script, args=[])

    def click(self, x: float, y: float):
        """Move the mouse to this point and press its button."""
        self._act("pointer", {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0},
                  {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def type(self, text: str):
        """Press the key of each character."""
        self._act("key", *({"type": kind, "value": char} for char in text
                           for kind in ("keyDown", "keyUp")))

    def scroll(self, down: float):
        """Turn the mouse wheel in the middle of the window, by this many pixels."""
        self._act("wheel", {"type": "scroll", "x": self.width // 2, "y": self.height // 2,
                            "deltaX": 0, "deltaY": round(down), "duration": 0})

    def _act(self, device: str, *steps: dict):
        self.command("POST", "/actions",
                     actions=[{"type": device, "id": device, "actions": list(steps)}])
