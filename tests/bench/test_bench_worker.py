"""The process that holds a model, with the real one: the orders of the benchmarks."""

from __future__ import annotations

import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.errors import BadInputError
from psikv_bench import messages
from psikv_bench.host import Host
from psikv_bench.messages import Setup, is_governed
from psikv_bench.worker import Worker

TIMEOUT_S = 600.0


def opened(host: Host) -> messages.Opened:
    return host.until(messages.Opened, TIMEOUT_S)


@pytest.mark.llama
class TestOrders:
    def test_a_governed_context_comes_back_bit_for_bit_after_a_trim(self, shallow_model):
        setup = Setup(
            variant="psi", model=str(shallow_model), context_tokens=600, decoded_tokens=16, auto=False
        )
        heard = []
        with Host(setup) as host:
            before = opened(host)
            assert before.cell_bytes == pytest.approx(4608, rel=0.01)
            host.order(Worker.decode, tokens=2, trim_at=1)
            host.until(messages.Done, TIMEOUT_S, heard.append)
            host.order(Worker.look)
            assert host.until(messages.Looked, TIMEOUT_S).live_cells < 600
            host.order(Worker.whole)
            whole = host.until(messages.Checked, TIMEOUT_S)
        assert (whole.missing_cells, whole.digest) == (0, before.digest)
        (trimmed,) = [message.event for message in heard if isinstance(message, messages.Governed)]
        assert trimmed.bytes_returned > 1 << 18

    def test_plain_and_governed_give_the_same_bits_from_one_saved_context(self, shallow_model, tmp_path):
        state = str(tmp_path / "state")
        setup = Setup(variant="fixed", model=str(shallow_model), context_tokens=64, decoded_tokens=8)
        with Host(setup) as host:
            digest = opened(host).digest
            host.order(Worker.save, path=state)
            host.until(messages.Done, TIMEOUT_S)
        for variant in ("fixed", "psi"):
            loaded = Setup(variant=variant, model=str(shallow_model), context_tokens=64, state=state)
            with Host(loaded) as host:
                assert opened(host).digest == digest

    def test_what_goes_on_goes_on_until_it_is_stopped(self, shallow_model):
        setup = Setup(
            variant="fixed", model=str(shallow_model), context_tokens=32, decoded_tokens=4, prompt_tokens=8
        )
        tokens = []
        with Host(setup) as host:
            opened(host)
            for order in (Worker.decode_on, Worker.prefill):
                host.order(order)
                for _ in range(6):  # past the four that are decoded in one go
                    tokens.append(host.until(messages.Token, TIMEOUT_S).tokens)
                host.order(Worker.stop)
                host.until(messages.Stopped, TIMEOUT_S)
        assert tokens == [1] * 6 + [8] * 6

    def test_a_restore_is_done_beside_what_goes_on_and_does_not_end_it(self, shallow_model):
        setup = Setup(
            variant="psi", model=str(shallow_model), context_tokens=600, decoded_tokens=16, auto=False
        )
        with Host(setup) as host:
            opened(host)
            host.order(Worker.decode, tokens=2, trim_at=1)
            host.until(messages.Done, TIMEOUT_S)
            host.order(Worker.decode_on)
            host.until(messages.Token, TIMEOUT_S)
            host.order(Worker.restore)
            host.until(messages.Governed, TIMEOUT_S)
            host.until(messages.Token, TIMEOUT_S)
            host.order(Worker.stop)
            host.until(messages.Stopped, TIMEOUT_S)

    def test_a_file_that_is_no_model_is_one_line(self, tmp_path):
        setup = Setup(variant="psi", model=str(tmp_path / "nothing.gguf"))
        with Host(setup) as host, pytest.raises(BadInputError, match=r"nothing\.gguf"):
            opened(host)


class Speaker(Host):
    """Says what it has to say in one go, and no more."""

    SAID = (
        messages.Token(time_s=1.0, seconds=0.1),
        messages.Done(seconds=2.0, cpu_s=1.0),
        messages.Stopped(),
    )

    def command(self, setup):
        lines = b"\n".join(map(msgspec.json.encode, self.SAID)).decode()
        return [sys.executable, "-c", f"print({lines!r}, flush=True); input()"]


def test_what_is_said_behind_what_was_waited_for_is_heard_by_the_next_who_waits():
    token, done, stopped = Speaker.SAID
    with Speaker(Setup(variant="fixed", model="none")) as host:
        heard = []
        while len(heard) < len(Speaker.SAID):
            heard += host.hear(TIMEOUT_S)
        host.hear_again(heard)
        others = []
        assert host.until(messages.Done, TIMEOUT_S, others.append) == done
        assert others == [token]
        assert host.until(messages.Stopped, TIMEOUT_S, others.append) == stopped
        assert others == [token]


def test_only_the_governed_variants_are_governed():
    assert [is_governed(variant) for variant in messages.VARIANTS] == [
        False, False, True, True, True, False,
    ]  # fmt: skip


def test_backings_reach_the_governor_by_their_variant():
    given = {
        variant: Setup(variant=variant, model="x").governor_settings().get("backing")
        for variant in messages.VARIANTS
    }
    assert given == {
        "fixed": None, "reference": None, "psi": None, "psi-file": "file", "psi-memory": "memory",
        "file-only": "file",
    }  # fmt: skip


@given(st.integers(1, 100_000), st.integers(0, 10_000))
def test_a_context_has_cells_for_everything_and_few_more(context_tokens, decoded):
    setup = Setup(variant="fixed", model="x", context_tokens=context_tokens, decoded_tokens=decoded)
    assert context_tokens + decoded < setup.cells <= context_tokens + decoded + 256
    assert setup.cells % 256 == 0
