"""What a browser shows of a page: headless Chromium, and the colours in its picture."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def take_picture(page: Path, directory: Path, height: int = 1400) -> Any:
    """The pixels of *page*; *directory* is for what Chromium writes."""
    shot = directory / "page.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={directory / 'profile'}", f"--window-size=1000,{height}",
         f"--screenshot={shot}", page.as_uri()],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    from matplotlib.image import imread

    return imread(shot)


def count(pixels: Any, colour: str) -> int:
    """How many of the *pixels* have this *colour*, as `#rrggbb`."""
    wanted = [part / 255 for part in bytes.fromhex(colour.removeprefix("#"))]
    return int((abs(pixels[..., :3] - wanted).max(axis=2) < 0.02).sum())
