"""The operator's web page: one document without outside parts, allowed to talk to this service only.

It is the same for everybody and tells nothing, so it opens without a token, asks for one if the service wants it, and shows it with every
call: a browser has no other place where an operator could put it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from aiohttp import hdrs, web

from rpc.server import OPEN_PATHS

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class PageEndpoint:
    """``/``."""

    def __init__(self) -> None:
        self._page = files("image_service").joinpath("pages/index.html").read_bytes()
        self._headers = {
            "Content-Security-Policy": policy_of(self._page),
            "Referrer-Policy": "no-referrer",
            hdrs.CACHE_CONTROL: "no-cache",
        }

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        app.router.add_get("/", self.get)
        app[OPEN_PATHS].add("/")

    async def get(self, _request: web.Request) -> web.Response:
        """GET /: the operator's page."""
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=self._headers)


def policy_of(page: bytes) -> str:
    """A Content-Security-Policy that lets the page's own script and style run, by their digests, and nothing else."""
    sources: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        sources[kind.decode()].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(sources['script'])}; style-src {' '.join(sources['style'])}; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
