"""How soon the bytes of an idle vLLM engine are back after it was asked: with writing, and already written.

    .venv-vllm/bin/python benchmarks/vllm_idle.py --repeats 5 --record data/bench-vllm/idle.json

It parks by the status socket, as `psi-kv park` does. Before the next time all comes back: as requests ask for
it, or read back by the governor, whose small reads make pages that take the kernel longer to drop.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Park, Unpark
from psi_kv_governor.engines.vllm.http import descendants
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import ask
from vllm_scene import LIMIT_BYTES, Engine, Where, keep, load_average, scheduled

FILLED, ASKED, READ = "filled by requests", "asked for by requests", "read back by the governor"


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """One time."""

    before: str
    """How the bytes had come into memory: filled, or back."""
    written_bytes: int
    """Of these bytes, the ones that had to be written first."""
    returned_bytes: int
    seconds: float
    processor_s: float
    """What the engine's threads worked meanwhile ..."""
    queued_s: float
    """... and what they waited for a processor that others had: little on a quiet machine."""


class Record(Where, kw_only=True):
    """All times of one engine; the first is dirty, the others were written before, as the kernel does it by
    itself half a minute after a page was written to."""

    load: float
    same: bool
    times: list[Parked]


def park(governed: Found, how: str) -> Parked:
    """Ask, and wait for the answer."""
    before, started = scheduled(governed.pid), time.monotonic()
    result = ask(governed, Park()).result
    seconds, after = time.monotonic() - started, scheduled(governed.pid)
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


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times that what was written is parked again")
    parser.add_argument("--record", type=Path, help="JSON file")
    options = parser.parse_args()
    load = load_average()
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
    record = Record(load=load, same=same, times=times)
    print(msgspec.json.format(msgspec.json.encode(record), indent=1).decode())
    keep(record, options.record)


if __name__ == "__main__":
    main()
