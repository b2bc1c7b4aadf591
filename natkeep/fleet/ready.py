"""Answers a restore that asks by the agent's socket whether the gateways of its move are ready.

Rule: nothing is done here. The agent is woken, and looks; the answer is what the store says, as of
`natkeep fleet wait --for ready`: all of the order is ready, with the NEW that this restore has, or
where that is asked the destination alone of a staged one.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from natkeep.agent_socket import LINE, is_roots, read_line
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.fleet import progress
from natkeep.fleet.done import Done
from natkeep.fleet.store import Store
from natkeep.fleet.want import a_text

LONGEST = 3600.0
_LOOK_EVERY = 0.005  # s; it is in the blackout
_PATIENCE = 5.0  # s for a line
_LONGEST_MESSAGE = LINE // 8  # characters; in JSON one may be six octets


class ReadyServer:
    """See above.

    find: the order that the agent has found what was prepared here to be of, and what it said of
    that; wake: have the agent look at what has these ids.
    """

    def __init__(
        self, listening: socket.socket, store: Store,
        find: Callable[[str], tuple[str, Done] | None], wake: Callable[[set[str]], None],
    ) -> None:  # fmt: skip
        self._listening, self._store, self._find, self._wake = listening, store, find, wake

    def start(self) -> None:
        """Answer from now on, each in a thread."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link:
            try:
                answer = self._answer(link)
            except (NatkeepError, TypeError, ValueError) as error:
                code = getattr(error, "exit_code", UsageError.exit_code)
                answer = {"ok": False, "exit": code, "message": str(error)[:_LONGEST_MESSAGE]}
            except OSError:
                return
            try:
                link.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:  # it has not waited
                return

    def _answer(self, link: socket.socket) -> dict[str, Any]:
        if not is_roots(link):
            raise RefusedError("only root is answered")
        link.settimeout(_PATIENCE)
        asked = read_line(link)
        if asked.get("verb") != "ready":
            raise UsageError('a line is {"verb": "ready", "id": ID, "new": NEW, "wait_s": SECONDS}')
        here, new = a_text(asked.get("id")), a_text(asked.get("new", ""))
        staged = asked.get("staged") is True
        seconds = float(asked.get("wait_s", 10))
        self._wake({here})
        until = time.monotonic() + min(seconds, LONGEST)
        lacking = "no time was given"
        while time.monotonic() < until:
            try:
                move_id, lacking = self._look(here, new, staged)
            except NatkeepError as error:  # the store is away, say: it may be back in time
                move_id, lacking = "", str(error)
            if not lacking:
                return {"ok": True, "id": move_id}
            if select.select([link], [], [], _LOOK_EVERY)[0]:
                raise ConnectionAbortedError  # it has gone, and asks again if need be
        raise NatkeepError(lacking)

    def _look(self, here: str, new: str, staged: bool) -> tuple[str, str]:
        """Of which order it is, and what is lacking."""
        found = self._find(here)
        if found is None:
            return "", f"no order with NEW auto is about {here}, as far as its agent knows"
        move_id, told = found
        if new and new != ",".join(text.partition("=")[2] for text in told.maps):
            return move_id, f"{here} has {', '.join(told.maps)}, and not {new}"
        move = progress.look(self._store, move_id)
        if not move.order.is_wanted():
            return move_id, f"{move_id} is undone, or to be"
        nodes = move.lacking("staged" if staged and move.order.phase == "staged" else "ready")
        return move_id, move.describe(nodes)
