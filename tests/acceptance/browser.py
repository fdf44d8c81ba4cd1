"""A real browser for tests, spoken to over its own debugging protocol: open a page, run a script in it, look at what it did."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import requests

from tests.waiting import PATIENCE, wait_until

START_TIMEOUT_S = 90.0
CALL_TIMEOUT_S = 60.0 * PATIENCE
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--window-size=1100,900", "about:blank",
)  # fmt: skip


class Page:
    """One tab. ``complaints`` has what the page was refused or stumbled over."""

    def __init__(self, url: str) -> None:
        self.complaints: list[str] = []
        self.answer_dialogs = True
        """What the page's questions are answered with."""
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._open(url))
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _open(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=64 << 20)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                await self._note(said["method"], said["params"])

    async def _note(self, event: str, said: Mapping[str, Any]) -> None:
        if event == "Page.javascriptDialogOpening":
            await self._send("Page.handleJavaScriptDialog", {"accept": self.answer_dialogs})
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif (
            event == "Log.entryAdded" and said["entry"]["source"] != "network"
        ):  # refused calls are the page's daily bread
            self.complaints.append(said["entry"]["text"])

    async def _send(self, method: str, arguments: Mapping[str, Any]) -> asyncio.Future[dict[str, Any]]:
        number = next(self._numbers)
        answer = self._answers[number] = self._loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": arguments})
        return answer

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One call of the protocol."""

        async def ask() -> dict[str, Any]:
            return await (await self._send(method, arguments))

        answer = self._run(ask())
        assert "error" not in answer, f"{method}: {answer}"
        result: dict[str, Any] = answer["result"]
        return result

    def go(self, url: str) -> None:
        """Open a URL and wait until it is there."""
        self.call("Page.navigate", url=url)
        wait_until(
            lambda: self.run(f"location.href === '{url}' && document.readyState === 'complete'"), f"{url} to open"
        )

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer}"
        return answer["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """What a reader sees."""
        return str(self.run(f"document.querySelector('{selector}').innerText"))

    def fill(self, selector: str, value: str) -> None:
        """Type a value."""
        self.run(f"document.querySelector('{selector}').focus()")
        self.call("Input.insertText", text=value)

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def click(self, selector: str) -> None:
        """Press what is there, as a mouse does."""
        box = self.run(
            f"(() => {{ const e = document.querySelector('{selector}'); e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> bytes:
        """The page as a PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        """Let go of the tab."""

        async def end() -> None:
            await self._socket.close()
            await self._reader
            await self._session.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def start_browser(profile: Path) -> Iterator[str]:
    """A browser with a fresh profile; the address of its debugging port."""
    program = shutil.which("chromium")
    assert program is not None, "apt-get install chromium"
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen([program, f"--user-data-dir={profile}", *SWITCHES], stdout=log, stderr=log)
    try:
        told = profile / "DevToolsActivePort"
        wait_until(lambda: told.is_file() and told.read_text().strip(), "the browser", timeout_s=START_TIMEOUT_S)
        yield f"127.0.0.1:{told.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait(30 * PATIENCE)


@contextmanager
def open_page(browser: str) -> Iterator[Page]:
    """A new tab."""
    tab = requests.put(f"http://{browser}/json/new", timeout=CALL_TIMEOUT_S).json()
    page = Page(tab["webSocketDebuggerUrl"])
    try:
        yield page
    finally:
        page.close()
        requests.get(f"http://{browser}/json/close/{tab['id']}", timeout=CALL_TIMEOUT_S)
