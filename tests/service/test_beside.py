"""`psi-kv exec --metrics --dashboard`: beside the program, and never in its way."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from servers import PSI_KV, free_port

from waiting import PATIENCE_S, until


@contextmanager
def started(*options: str, program: tuple[str, ...] = ("sleep", "900")):
    process = subprocess.Popen([*PSI_KV, "exec", *options, "--", *program], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()  # and so the program
        process.wait(PATIENCE_S)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def scraped(port: int) -> str:
    try:
        return get(f"http://127.0.0.1:{port}/metrics")
    except urllib.error.URLError:
        return ""


def test_both_are_served_and_the_signal_still_goes_to_the_program():
    port = free_port()
    with started("--metrics", str(port), "--dashboard", "0") as process:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        until(lambda: "psikv_resident_bytes" in scraped(port))
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.build_opener(urllib.request.HTTPCookieProcessor()).open(
            url, timeout=PATIENCE_S
        ) as page:
            assert "<h1>" in page.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) in {-signal.SIGTERM, 128 + signal.SIGTERM}
    assert scraped(port) == ""


def test_a_port_in_use_is_one_line_and_the_program_runs(run, python):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(python, "-c", "print('ran'); exit(7)", options=("--metrics", port, "--dashboard", port))
    assert (done.returncode, done.stdout) == (7, "ran\n")
    lines = [line for line in done.stderr.splitlines() if "Address already in use" in line]
    assert [line.partition(" at ")[0] for line in lines] == ["psi-kv: no metrics", "psi-kv: no dashboard"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--metrics", "--dashboard"])
def test_what_is_no_address_is_refused_before_anything_is_started(run, python, option):
    done = run(python, "-c", "print('ran')", options=(option, "here"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{option} here is no address" in done.stderr


@pytest.mark.parametrize(
    ("option", "module"), [("--metrics", "prometheus_client"), ("--dashboard", "starlette")]
)
def test_without_the_extra_one_line_says_what_to_install(option, module):
    without = f"import sys; sys.modules[{module!r}] = None; from psi_kv_governor.cli import main; main()"
    command = [sys.executable, "-c", without, "exec", option, "0", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"pip install 'psi-kv-governor[{option[2:]}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_scrapes_while_the_program_ends_leave_its_status_alone():
    port = free_port()
    stop = threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            try:
                scraped(port)
            except (OSError, http.client.HTTPException):  # cut off in the middle
                continue

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        with started("--metrics", str(port), program=("sh", "-c", "sleep 1; exit 9")) as process:
            _, errors = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 9
            assert "Traceback" not in errors
    finally:
        stop.set()
        scraper.join()


def test_a_dashboard_of_a_process_that_is_not_there_is_one_line():
    done = subprocess.run([*PSI_KV, "dashboard", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "governed process" in done.stderr


def test_the_dashboard_command_serves_a_governed_program_and_acts_on_it():
    with started() as process:
        pid = str(process.pid)

        def listed() -> bool:
            done = subprocess.run([*PSI_KV, "status", pid, "--json"], capture_output=True, check=False)
            return done.returncode == 0

        until(listed)
        looking = subprocess.Popen([*PSI_KV, "dashboard", pid], stdout=subprocess.PIPE, text=True)
        try:
            url = re.search(r"http://\S+", looking.stdout.readline())[0]
            base, token = url.split("/?token=")
            port = base.rpartition(":")[2]
            asked = urllib.request.Request(
                f"{base}/command",
                json.dumps({"do": "limit", "share": 0.5}).encode(),
                {"Cookie": f"psikv_{port}={token}", "Origin": base},
            )
            with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
                assert answer.status == 200
            told = subprocess.run(
                [*PSI_KV, "status", pid, "--json"], capture_output=True, text=True, check=True
            )
            assert '"limit":0.5' in told.stdout.replace(" ", "")
            looking.send_signal(signal.SIGINT)
            assert looking.wait(PATIENCE_S) == 0
        finally:
            looking.kill()
            looking.wait()
