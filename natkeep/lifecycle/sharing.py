"""the sharing of work among processors: parts of it are done by children, which tell what came out.

Rule: a child only looks. What it could not do, for whatever reason, is done once more by whoever
started it, who then also says what is wrong; and none outlives the call.
"""

from __future__ import annotations

import gc
import marshal
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def do_at_once(parts: Sequence[Callable[[], T]], settle: Callable[[], None]) -> list[T]:
    """What each of *parts* returns; all but the first are done by children.

    It must be of what marshal knows. settle: what a child does before, as it shares descriptors
    with whoever started it. There may be no other thread.
    """
    children: list[tuple[int, int]] = []
    try:
        for part in parts[1:]:
            children.append(_start(part, settle))
        results = [parts[0]()]
        for part in parts[1:]:
            told = _read(children[0])
            del children[0]
            results.append(part() if told is None else marshal.loads(told))
        return results
    finally:
        for child in children:
            _read(child)


def _start(part: Callable[[], T], settle: Callable[[], None]) -> tuple[int, int]:
    """The number of a child that does *part*, and where it tells what came out."""
    told, telling = os.pipe()
    gc.freeze()  # what is there already stays one and the same memory
    process = os.fork()
    if process:
        gc.unfreeze()
        os.close(telling)
        return process, told
    code = 1
    try:
        gc.disable()
        os.close(told)
        settle()
        with os.fdopen(telling, "wb") as file:
            file.write(marshal.dumps(part()))  # type: ignore[arg-type]  # as promised
        code = 0
    finally:
        os._exit(code)  # nothing of what is written or cleared at an exit is the child's


def _read(child: tuple[int, int]) -> bytes | None:
    """What a child told; None if it came to no end."""
    process, told = child
    try:
        with os.fdopen(told, "rb") as file:
            content = file.read()
    finally:
        _, status = os.waitpid(process, 0)
    return None if status else content
