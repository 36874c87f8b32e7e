"""One engine over two nodes, each in a network and memory cgroup of its own; only the far one is pressed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from psi_kv_governor.sandbox.sandbox import Sandbox
from vllm_scene import ENVIRON, MIB, Engine, Trims, narrow, press
from vllm_scene_child import OPTIONS, make_model

pytestmark = [pytest.mark.cgroup, pytest.mark.slow, pytest.mark.timeout(1300)]

SPARE_MIB, NEIGHBOUR_MIB = 300, 650
"""Each node has 480 MiB of the cached prompts."""
RATE_MIB_S, MOST_ROUNDS = 50, 20
"""Slow enough that a step is made while it is short: at 200 MiB/s, with steps of a second on a busy machine,
the kernel had taken the cache before the far node's reading came, and nothing was left to give."""
PORT = 29517
STAGES = {
    "pipeline_parallel_size": 2,
    "nnodes": 2,
    "master_port": PORT,
    "distributed_executor_backend": "mp",
    # Eager stages end in vLLM itself (no warm-up makes their tensors): traced, and then run as they are.
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks() -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """For each node what it is started with: the command before its own, and its environment."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes: there is no `ip` (apt install iproute2)")
    names = [f"psikv-{os.getpid()}-{node}" for node in range(2)]
    links = [f"pk{os.getpid()}{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two nodes: no network namespace can be made here ({error.stderr.decode().strip()})")
    try:
        first, second = ["link", "add", links[0], "netns", names[0]], ["name", links[1], "netns", names[1]]
        ip(*first, "type", "veth", "peer", *second)
        for node, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("-n", name, "addr", "add", f"10.78.0.{node + 1}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        yield [
            (
                # Not `ip netns exec`: it puts a /sys without cgroups in place, as no real node has.
                ["nsenter", f"--net=/run/netns/{name}"],
                {"VLLM_HOST_IP": f"10.78.0.{node + 1}", "GLOO_SOCKET_IFNAME": link},
            )
            for node, (name, link) in enumerate(zip(names, links, strict=True))
        ]
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def serve_far(sandbox: Sandbox, folder, prefix: list[str], environ: dict[str, str]) -> subprocess.Popen:
    """The second node, as a user starts it."""
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "wide"), "--headless"]
    connector = {"kv_connector": "PsiKvConnector", "kv_role": "kv_both"}
    options = {
        **OPTIONS,
        **STAGES,
        "node_rank": 1,
        "master_addr": "10.78.0.1",
        "kv_transfer_config": connector,
    }
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else []
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return sandbox.popen(
        [*prefix, *words],
        stdout=(folder / "far.log").open("wb"),
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRON, **environ},
    )


def test_pressure_on_the_far_node_has_it_give_and_texts_stay(tmp_path, networks):
    """The engine's own node has all the memory that it wants: it hears of the other's."""
    make_model(tmp_path / "wide")
    with Sandbox(3 << 30) as far, Sandbox(3 << 30) as near:
        serve_far(far, tmp_path, *networks[1])
        prefix, environ = networks[0]
        options = {**STAGES, "node_rank": 0, "master_addr": "10.78.0.1"}
        engine = Engine(near, tmp_path, "governed", prefix=prefix, environ=environ, **options)
        engine.hear("filled")
        trims = Trims(engine.child.pid)
        trims.start()
        narrow(far, far.group.usage_bytes() + SPARE_MIB * MIB)
        engine.say("go")
        engine.hear("round")
        neighbour, taken_s = press(far, RATE_MIB_S, NEIGHBOUR_MIB)
        assert taken_s is not None
        for number in range(MOST_ROUNDS):
            if number >= 4 and given_up(trims) > 100 * MIB:
                break
            engine.hear("round")
        neighbour.terminate()
        engine.say("stop")
        assert engine.hear("again")["same"]
        assert (far.group.oom_kills(), near.group.oom_kills()) == (0, 0)
        assert given_up(trims) > 100 * MIB


def given_up(trims: Trims) -> int:
    return sum(trim.bytes_returned for trim in trims.found)
