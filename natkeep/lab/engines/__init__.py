"""The engines, by name; see engine.py for what each offers."""

from __future__ import annotations

import shutil

from natkeep.lab.engine import Engine, EngineError
from natkeep.lab.engines.criu import Criu, find_containerd, find_criu
from natkeep.lab.engines.podman import Podman
from natkeep.lab.engines.repair import Repair
from natkeep.lab.engines.runc import Runc


def choose_engine(name: str = "auto", *, probe: bool = True) -> Engine:
    """The engine called *name*; `auto` is criu where it works, else repair.

    EngineError where it does not work here. probe: whether `repair` sends CRIU's window probe.
    """
    criu = None if name == "repair" else find_criu()
    if criu is None and name in ("auto", "repair"):
        return Repair(probe=probe)
    if criu is None:
        raise EngineError(
            "there is no CRIU that works on this kernel",
            hint="run `make demo` or scripts/get-criu once, or use --engine repair",
        )
    if name in ("auto", "criu"):
        return Criu(criu)
    if name == "containerd" and find_containerd() is None:
        raise EngineError("there is no containerd 2.1", hint="scripts/get-containerd")
    for tool in dict.fromkeys(("runc" if name == "containerd" else name, "runc")):
        if not shutil.which(tool):
            raise EngineError(f"there is no {tool}", hint=f"apt-get install {tool}")
    if name == "containerd":
        return Criu(criu)  # of a lab that has pods: pods/move.py is the engine then
    return Runc(criu) if name == "runc" else Podman(criu)
