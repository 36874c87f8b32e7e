#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that parses what others wrote.

    python scripts/fuzz.py                       # every parser, 5 s each
    python scripts/fuzz.py psi gguf --seconds 600 --corpus .fuzz

A parser may raise the package's declared errors and nothing else. An input that makes it raise another is
kept as `fuzz-TARGET-...` in the working directory, and run again with `--repeat FILE`. Needs atheris
(`pip install atheris`; there are wheels for Linux on x86-64).
"""

from __future__ import annotations

import argparse
import base64
import gzip
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
LONGEST_BYTES = 4096


class Target(NamedTuple):
    """A parser, and what it is begun with."""

    open: Callable[[Path], Callable[[bytes], object]]
    """Given a file to write to, gives what is called with each input. Imports the parser when it is called,
    so that it comes under the instrumentation."""
    seeds: tuple[bytes, ...]


# -- the parsers --------------------------------------------------------------------------------------------


def _psi(_: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.pressure.psi import parse_psi

    return parse_psi


def _events(_: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.pressure.limit_events import parse_events

    return parse_events


def _tables(_: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.pressure.memory_stat import V1, V2
    from psi_kv_governor.pressure.whole_machine import parse_meminfo

    def parse(data: bytes) -> None:
        assert min(V1.stat.read(data)) >= 0
        assert min(V2.stat.read(data)) >= 0
        memory = parse_meminfo(data)
        assert memory is None or (min(memory) >= 0 and memory.headroom_bytes >= 0)

    return parse


def _cgroup(_: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.kernel.mountinfo import parse_mounts
    from psi_kv_governor.pressure.cgroup import parse_membership

    def parse(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        assert all(path.startswith("/") for path in parse_membership(text).values())
        assert not any(" " in mount.number + mount.fs_type for mount in parse_mounts(text))

    return parse


def _watch(_: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.pressure.systemd import WATCH, WRITE, parse_watch

    def parse(data: bytes) -> None:
        path, _, first = data.decode(errors="surrogateescape").partition("\n")
        parse_watch({WATCH: path, WRITE: first})

    return parse


def _trace(file: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.pressure.trace import read_trace

    return _by_file(file, read_trace)


def _recording(file: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.recording import read_recording

    return _by_file(file, read_recording)


def _config(file: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.config import load_config

    return _by_file(file, lambda path: load_config(path, {}))


def _gguf(file: Path) -> Callable[[bytes], object]:
    from psi_kv_governor.gguf_file import read_gguf

    return _by_file(file, read_gguf)


def _by_file(file: Path, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> None:
        file.write_bytes(data)
        parse(file)

    return run


def _model() -> bytes:
    """A GGUF file of one value and one tensor of 32 floats."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    value = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    head += value + text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 0)
    return head + bytes(-len(head) % 32 + 128)


_PSI = b"some avg10=1.25 avg60=0.00 avg300=0.00 total=%d\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
_READING = b'{"time_s":1.0,"interval_s":0.5,"some":0.1,"full":0.0,"headroom_bytes":5,"limit_bytes":9}'
_TRACE = b'{"psi_kv_trace":2}\n{"reading":%b}\n' % _READING

TARGETS = {
    "psi": Target(_psi, (_PSI % 147585670, _PSI % (2**64 - 1), b"some\n")),
    "events": Target(_events, (b"low 0\nhigh 3\nmax 12\noom 1\noom_kill 1\n",)),
    "tables": Target(
        _tables,
        (
            b"MemTotal:  8000 kB\nMemAvailable:  4000 kB\nMapped: 300 kB\nShmem: 100 kB\n",
            b"anon 1\ninactive_file 400\nactive_file 9\nfile_mapped 50\nshmem 7\n",
            b"total_shmem 1\ntotal_mapped_file 8\ntotal_inactive_file 4\ntotal_active_file 2\n",
        ),
    ),
    "cgroup": Target(
        _cgroup,
        (
            b"9:name=systemd:/\n4:memory:/app/one\n0::/a:b/c (deleted)\n",
            b"31 23 0:28 / /sys/fs/my\\040cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
            b"35 31 0:32 /x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        ),
    ),
    "watch": Target(_watch, (b"/sys/fs/x\n" + base64.b64encode(b"some 200000 2000000\0"), b"/dev/null\n")),
    "trace": Target(_trace, (_TRACE, gzip.compress(_TRACE))),
    "recording": Target(_recording, (_TRACE, gzip.compress(_TRACE))),
    "config": Target(
        _config, (b'high = 0.2\npolicy = "keydiff"\n', b"[table]\nx = [1, 2]\n", b"high = " + b"[" * 2000)
    ),
    "gguf": Target(_gguf, (_model(),)),
}


# -- running them --------------------------------------------------------------------------------------------


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one parser with libFuzzer's `options`; ends the process."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["psi_kv_governor", "tomllib"]):
        from psi_kv_governor.errors import PsiKvError

        # A file in memory: on disk, each input would wait for it.
        parse = TARGETS[name].open(Path(f"/proc/self/fd/{os.memfd_create('input')}"))

    def run(data: bytes) -> None:
        try:
            parse(data)
        except PsiKvError as error:
            if "\n" in str(error):
                raise AssertionError("the message of a declared error is more than one line") from error

    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each target in a process of its own. Exit status 1 when one of them raised what it may not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default all)")
    parser.add_argument("--seconds", type=int, default=5, help="for each target (default %(default)s)")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many inputs for each target")
    parser.add_argument("--corpus", type=Path, help="folder to keep what was found between runs")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run this one input")
    given = parser.parse_args()
    if unknown := sorted(set(given.targets) - set(TARGETS)):
        parser.error(f"unknown target {unknown[0]!r}: known are {', '.join(TARGETS)}")
    try:
        import atheris  # noqa: F401
    except ImportError:
        parser.error("atheris is not installed: pip install atheris (wheels for Linux on x86-64)")
    failed = [name for name in given.targets or TARGETS if not _run_apart(name, given)]
    print(f"failed: {', '.join(failed)}" if failed else "all parsers held")
    return 1 if failed else 0


def _run_apart(name: str, given: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="psi-kv-fuzz-") as scratch:
        corpus = (given.corpus or Path(scratch)) / name
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
        found = [str(given.repeat)] if given.repeat else [str(corpus)]
        options = [
            f"-max_total_time={given.seconds}",
            f"-runs={given.runs}",
            f"-max_len={LONGEST_BYTES}",
            f"-artifact_prefix=fuzz-{name}-",
            "-print_final_stats=1",
            "-verbosity=0",
        ]
        print(f"{name}: ", end="", flush=True)
        done = subprocess.run(
            [sys.executable, "-c", _INNER, str(HERE.parent), name, *options, *found],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        print(f"FAILED\n{done.stdout}")
        return False
    runs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
    print(f"{int(runs[1]):,} inputs" if runs else "done")
    return True


_INNER = "import sys; sys.path.insert(0, sys.argv[1]); import fuzz; fuzz.fuzz(sys.argv[2], sys.argv[3:])"


if __name__ == "__main__":
    sys.exit(main())
