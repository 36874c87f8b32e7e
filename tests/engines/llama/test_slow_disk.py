"""A disk that takes 2 MB/s: a deadline holds inside of a write, and not only between two."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from waiting import until

pytestmark = pytest.mark.llama

THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
MB_PER_S = 2

SCRIPT = """
import json, sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=False, reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(192)])
client = Client(InProcess(agent.serve))
region = client.regions(count_resident=True)[0]
reply = client.ask(Op.PARK, region.id, -1, deadline_s=0.2)
left = client.regions(count_resident=True)[0].resident
print(json.dumps({"resident": region.resident, "left": left, "written": reply.written,
                  "returned": reply.n_bytes, "done": reply.done, "problem": reply.problem}))
"""


@contextlib.contextmanager
def slow_disk(folder: Path) -> Iterator[Path]:
    """An ext4 on a loop device that the kernel lets take so much a second."""
    if os.geteuid() != 0 or not THROTTLE.exists() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root, mkfs.ext4 and the blkio controller of cgroup v1 to slow a disk down")
    image, point = folder / "slow.img", folder / "slow"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        device = point.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        THROTTLE.write_text(f"{number} {MB_PER_S * 1000 * 1000}")
        try:
            yield point
        finally:
            THROTTLE.write_text(f"{number} 0")
    finally:
        # Who looks at all processes of the machine may hold what the child held a moment longer than it.
        until(lambda: subprocess.run(["umount", str(point)], check=False).returncode == 0)


def test_a_deadline_holds_inside_of_a_write(wide_model, folder):
    with slow_disk(folder) as place:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(wide_model), str(place)],
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout)
    assert out["problem"] == ""
    assert out["resident"] > 12 << 20, out
    # 0.2 s are 0.4 MB of this disk: what is begun by then is a MiB, and not the eight of a slice.
    assert out["done"] is False, out
    assert 0 < out["written"] <= 3 << 20, out
    assert out["returned"] >= out["written"] // 2, out  # and what was written is given back at once
    assert out["left"] <= out["resident"] - out["returned"] + (1 << 20), out
