"""Calls that change what replicas are: they succeed in all of them or in none."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import httpx
from starlette.responses import Response

from liaoyuan.serving.errors import ApiError
from liaoyuan.serving.replicas import Call, Replica, Replicas, send_call

Reply = TypeVar("Reply")

# Path -> what the call decides, and whether a replica that starts later must be told (else it is born so).
DECIDES: Mapping[str, tuple[str, bool]] = {
    "/pause": ("running", True),
    "/resume": ("running", False),
    "/sleep": ("awake", True),
    "/wake_up": ("awake", False),
    "/update_weights": ("weights", True),
    "/reset_prefix_cache": ("prefixes", False),
    "/v1/load_lora_adapter": ("adapter", True),
    "/v1/unload_lora_adapter": ("adapter", False),
}


def decides(path: str) -> bool:
    """Return whether a call of this path changes a replica's state."""
    return path in DECIDES


def change_all(replicas: Replicas, call: Call) -> Response:
    """Make a call in all replicas and return the first one's reply; see `all_or_none`. Those that die meanwhile, and
    those that start later, get the state after it.

    Raises:
        ApiError: no replica is there to answer.
    """
    with replicas.changing:
        reply = all_or_none(replicas, lambda replica: _reply(replica, call), lambda reply: not reply.is_success)
        if reply is None:
            raise ApiError(503, "No replica could do it; they are being started.", code="replica_failed")
        if reply.is_success:
            _keep(replicas.state, call, reply)
        return _response(reply)


def all_or_none(
    replicas: Replicas, make: Callable[[Replica], Reply | None], is_refusal: Callable[[Reply], bool]
) -> Reply | None:
    """Make a call in all replicas that are ready, and return what the first one says. If some refuse it, a refusal; the
    others are started anew then, in the state before. None: nobody is there.

    make: returns None if the replica is gone. replicas.changing must be held.
    """
    ready = replicas.ready
    with ThreadPoolExecutor(max(1, len(ready))) as pool:
        replies = list(zip(ready, pool.map(make, ready), strict=True))
    refused = [reply for _, reply in replies if reply is not None and is_refusal(reply)]
    done = [(replica, reply) for replica, reply in replies if reply is not None and not is_refusal(reply)]
    if refused:
        for replica, _ in done:
            replica.kill()
        return refused[0]
    return done[0][1] if done else None


def _reply(replica: Replica, call: Call) -> httpx.Response | None:
    try:
        return send_call(replica.url, call)
    except httpx.HTTPError:  # it is gone, and comes back in whatever state the others are in
        replica.kill()
        return None


def _keep(state: dict[str, Call], call: Call, reply: httpx.Response) -> None:
    """Keep a call for replicas that start later, in place of the one that decided the same before."""
    path = call.target.partition("?")[0]
    what, lasts = DECIDES[path]
    if what == "adapter":
        what = f"adapter {json.loads(call.body).get('lora_name')}"
    if what == "weights":  # whoever reads them later calls them by the same number
        call = replace(call, body=json.dumps({**json.loads(call.body), "version": reply.json()["version"]}).encode())
    state.pop(what, None)
    if lasts:
        state[what] = call


def _response(reply: httpx.Response) -> Response:
    return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))
