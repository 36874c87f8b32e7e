"""The process that holds a model, with the real one: orders, and that plain llama.cpp is plain."""

from __future__ import annotations

import pytest

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox import llm, messages
from psi_kv_governor.sandbox.host import Host
from psi_kv_governor.sandbox.messages import Setup

TIMEOUT_S = 120.0


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
            host.order(messages.Trim(fraction=1.0))
            host.until(messages.Done, TIMEOUT_S, heard.append)
            host.order(messages.Look())
            assert host.until(messages.Looked, TIMEOUT_S).live_cells < 600
            host.order(messages.Whole())
            whole = host.until(messages.Checked, TIMEOUT_S)
        assert (whole.missing_cells, whole.digest) == (0, before.digest)
        (trimmed,) = [message.event for message in heard if isinstance(message, messages.Governed)]
        assert trimmed.bytes_returned > 1 << 20

    def test_plain_and_governed_give_the_same_bits_from_one_saved_context(self, shallow_model, tmp_path):
        state = str(tmp_path / "state")
        setup = Setup(variant="fixed", model=str(shallow_model), context_tokens=64, decoded_tokens=8)
        with Host(setup) as host:
            digest = opened(host).digest
            host.done(messages.Save(path=state), TIMEOUT_S)
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
            for order in (messages.Decode(), messages.Prefill()):
                host.order(order)
                for _ in range(6):  # past the four that are decoded in one go
                    tokens.append(host.until(messages.Token, TIMEOUT_S).tokens)
                host.order(messages.Stop())
                host.until(messages.Stopped, TIMEOUT_S)
        assert tokens == [1] * 6 + [8] * 6

    def test_a_file_that_is_no_model_is_one_line(self, tmp_path):
        setup = Setup(variant="psi", model=str(tmp_path / "nothing.gguf"))
        with Host(setup) as host, pytest.raises(BadInputError, match=r"nothing\.gguf"):
            opened(host)


class TestPlain:
    def maps(self, tmp_path, *files: str):
        path = tmp_path / "maps"
        path.write_text("".join(f"7f00-7f01 r-xp 00000000 fe:00 11    {file}\n" for file in files))
        return path

    def test_one_llama_is_plain(self, tmp_path):
        llm.check_plain(self.maps(tmp_path, "/a/psi-kv-governor/.venv/libllama.so", "/lib/libc.so.6"))
        llm.check_plain(tmp_path / "no such file")

    @pytest.mark.parametrize(
        "files", [("/a/libllama.so", "/b/libllama.so.0"), ("/a/libllama.so", "/b/libpsikv.so")]
    )
    def test_an_agent_in_front_of_it_is_not(self, tmp_path, files):
        with pytest.raises(PsiKvError, match="not plain"):
            llm.check_plain(self.maps(tmp_path, *files))

    def test_only_the_governed_variants_are_governed(self):
        assert [llm.is_governed(variant) for variant in messages.VARIANTS] == [
            False, False, True, True, True, False,
        ]  # fmt: skip

    def test_backings_reach_the_governor_by_their_variant(self):
        given = {
            variant: llm.settings_of(Setup(variant=variant, model="x")).get("backing")
            for variant in messages.VARIANTS
        }
        assert given == {
            "fixed": None, "reference": None, "psi": None, "psi-file": "file", "psi-memory": "memory",
            "file-only": "file",
        }  # fmt: skip
