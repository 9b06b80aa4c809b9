"""One file from the network, with a progress bar, resumed where it broke off."""

from __future__ import annotations

import shutil
from pathlib import Path

import requests
from rich.console import Console
from rich.progress import wrap_file
from urllib3.exceptions import HTTPError

BROKEN = (requests.RequestException, HTTPError)  # what a connection that fails may raise


def fetch(url: str, part: Path) -> None:
    """Complete `part` from `url`, going on from what it holds (pooch would begin anew).

    A broken connection is taken up again as long as that brings new bytes. What has come stays in
    `part`, for the next process too. Raises one of BROKEN when no new bytes come.
    """
    console = Console(stderr=True)
    while True:
        have = part.stat().st_size if part.exists() else 0
        # identity: a range counts bytes as stored, so nothing may be encoded on the way.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as response:
                if response.status_code == 416:  # nothing beyond what we have: its hash decides
                    return
                response.raise_for_status()
                # A server that knows no ranges sends the whole file, which replaces the part.
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                with (
                    part.open("ab" if goes_on else "wb") as out,
                    wrap_file(
                        response.raw,
                        total=int(response.headers.get("Content-Length", 0)),
                        description=url.rsplit("/", 1)[-1],
                        console=console,
                        disable=not console.is_terminal,
                    ) as source,
                ):
                    return shutil.copyfileobj(source, out)
        except BROKEN:
            if not part.exists() or part.stat().st_size <= have:
                raise
