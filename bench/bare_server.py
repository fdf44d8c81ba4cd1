"""The reference of the RPC benchmark: aiohttp and uvloop with a handler that only parses and answers JSON."""

from __future__ import annotations

import asyncio

import orjson
import uvloop
from aiohttp import web

_ANSWER = {
    "images": [{"id": "bench", "type": "kvm", "volume": "mistify/images/bench", "size": 64, "status": "complete"}]
}


async def _answer(request: web.Request) -> web.Response:
    call = orjson.loads(await request.read())
    reply = {"result": _ANSWER, "error": None, "id": call["id"]}
    return web.Response(body=orjson.dumps(reply), content_type="application/json")


async def _serve() -> None:
    app = web.Application()
    app.router.add_post("/_mistify_RPC_", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve())
