"""The dashboard on a real llama-server that goes through a spike of a real neighbour, in a memory cgroup."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, chromium, look, picture
from selenium.webdriver.common.by import By
from servers import PSI_KV, debian_server, free_port

from packages_help import Unavailable
from psi_kv_governor.sandbox.sandbox import Sandbox
from waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.llama,
    pytest.mark.cgroup,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first test that needs Debian's server fetches it
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="there is no Chromium: apt install chromium chromium-driver"
    ),
]
LIMIT_BYTES = 400 << 20
NEIGHBOUR = """
import mmap, sys, time
left = int(sys.argv[1]); kept = []
while left > 0:  # 40 MB/s: a build, not a bomb
    one = mmap.mmap(-1, 4 << 20)
    for at in range(0, 4 << 20, 4096): one[at] = 1
    kept.append(one); left -= 4 << 20; time.sleep(0.1)
print("there", flush=True); time.sleep(600)
"""
STORY = "The quick brown fox jumps over the lazy dog and goes home. " * 60


def complete(port: int, prompt: str) -> None:
    body = json.dumps({"prompt": prompt, "n_predict": 4, "temperature": 0, "cache_prompt": True}).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        assert answer.status == 200


def mib(words: str) -> float:
    value, unit = words.split()
    return float(value) * (1024 if unit == "GiB" else 1)


def test_a_llama_server_is_seen_giving_memory_back_in_a_spike(shallow_model, tmp_path):
    try:
        server = debian_server()
    except Unavailable as error:
        pytest.skip(f"Debian's llama-server can't be had here: {error}")
    port = free_port()
    place = Path(__file__).parents[2] / "out" / f"dashboard-{os.getpid()}"
    place.mkdir(parents=True)
    flags = ["-m", str(shallow_model), "-c", "8192", "-t", "1", "-np", "4", "--port", str(port), "-fa", "on"]
    command = [*PSI_KV, "exec", "--dashboard", "0", "--place", str(place), "--backing", "memory"]
    log = (tmp_path / "log").open("w+")
    with Sandbox(LIMIT_BYTES) as sandbox, chromium(tmp_path / "profile") as page:
        program = tmp_path / "llama-server"  # Debian's is started by its own loader
        program.write_text(f'#!/bin/sh\nexec {shlex.join(server)} "$@"\n')
        program.chmod(0o755)
        sandbox.popen([*command, "--", str(program), *flags], stdout=log, stderr=log)
        url = ""

        def printed() -> bool:
            nonlocal url
            found = re.search(r"psi-kv: dashboard at (\S+)", (tmp_path / "log").read_text())
            url = found[1] if found else ""
            return bool(url) and "listening" in (tmp_path / "log").read_text()

        until(printed, "the server did not come up")
        look(page, 1600)
        page.get(url)

        def said(what: str) -> str:
            return page.find_element(By.ID, what).get_property("textContent")

        for number in range(3):
            complete(port, f"Story {number}. {STORY}")
        page.refresh()  # what it showed may be from before the last story
        until(lambda: "live" in said("caches") and "running" not in said("caches"), "no idle cache is seen")
        before = mib(said("resident"))
        # All but a little of what is left, so that the cache has to give.
        room = mib(said("headroom"))
        neighbour = sandbox.popen(
            [sys.executable, "-c", NEIGHBOUR, str(int((room - 12) * 2**20))], stdout=subprocess.PIPE
        )
        until(lambda: "trimmed" in said("log"), "nothing was given")
        until(lambda: mib(said("resident")) < before, "the cache did not get smaller")
        assert neighbour.stdout.readline() == b"there\n"
        pictures = os.environ.get("PSIKV_PICTURES")
        time.sleep(3 if pictures else 0)
        neighbour.kill()
        complete(port, f"Story 0. {STORY} And then")
        until(lambda: mib(said("headroom")) > room / 2, "the neighbour is gone")
        if pictures:
            time.sleep(2)
            picture(page, Path(pictures) / "dashboard.png")
    assert "Traceback" not in (tmp_path / "log").read_text()
    log.close()
