"""A real engine in a memory cgroup without swap: what is parked is really back, and nobody is killed."""

from __future__ import annotations

import time

import pytest

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Park
from psi_kv_governor.engines.vllm.http import descendants
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.status_client import ask
from vllm_scene import KV_MIB, LIMIT_BYTES, MIB, Engine, play
from waiting import until

pytestmark = [pytest.mark.cgroup, pytest.mark.timeout(1300)]


@pytest.mark.slow
def test_a_neighbour_that_takes_more_than_is_left_kills_nobody(tmp_path):
    """At 200 MB/s."""
    told = play(tmp_path, "governed", 200)
    assert (told.same, told.kills) == (True, 0)
    assert told.taken_s is not None
    assert sum(told.returned_bytes) > 0
    assert told.pressed_tokens_per_s > 0


@pytest.mark.slow
def test_without_us_it_kills(tmp_path):
    """The scene is one: stock vLLM, or its neighbour, does not live through it."""
    assert play(tmp_path, "stock", 200).kills > 0


@pytest.mark.slow
def test_an_idle_engine_gives_its_cache_back_when_it_is_asked_to(tmp_path):
    """By the status socket, as `psi-kv park` does; and says the same afterwards."""
    with Sandbox(LIMIT_BYTES) as sandbox:
        one = Engine(sandbox, tmp_path, "governed", processes=2)
        one.hear("filled")
        before = sandbox.group.usage_bytes()
        (governed,) = [it for it in socket_place.find() if it.pid in descendants(one.child.pid)]
        started, returned = time.monotonic(), list[int]()

        def parked() -> bool:
            returned.append(ask(governed, Park()).result.bytes_returned)
            return sum(returned) > 0.8 * KV_MIB * MIB

        until(
            parked
        )  # where the disk is busy it ends after what is waited for, and counts with the next order
        print(f"parked {sum(returned) >> 20} MiB in {time.monotonic() - started:.2f} s")
        assert sandbox.group.usage_bytes() < before - 0.7 * KV_MIB * MIB
        one.say("idle")
        one.say("on")
        assert one.hear("again")["same"]
