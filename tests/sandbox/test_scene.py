"""The scene: what it measures, what it makes of a kill, and that nothing of it stays behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_models import LARGE, write_model
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Restored, Trimmed
from psi_kv_governor.sandbox import text
from psi_kv_governor.sandbox.host import MIB, drop_file_cache
from psi_kv_governor.sandbox.messages import Governed, Progress, Setup
from psi_kv_governor.sandbox.scene import run_scene
from psi_kv_governor.sandbox.scene_options import SceneOptions, Tick
from sandbox_help import leftovers

SMALL = {"context_tokens": 96, "tokens": 8}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = leftovers()
    yield
    assert [entry for entry in leftovers() if entry not in before] == []


@pytest.mark.llama
class TestGentle:
    def test_plain_llama_decodes_and_gives_nothing_up(self, demo_model):
        events = []
        options = SceneOptions(model=str(demo_model), gentle=True, **SMALL)
        result = run_scene("fixed", options, events.append)
        assert (result.tokens, result.killed, result.restored, result.bytes_returned) == (8, False, None, 0)
        assert result.p99_s >= result.p50_s > 0
        assert result.tokens_per_s == pytest.approx(8 / result.seconds)
        # the peak is sampled, and a page may come after the last sample
        assert result.peak_resident_bytes + MIB > result.final_resident_bytes > 50 * MIB
        stages = [event.stage for event in events if isinstance(event, Progress)]
        assert list(dict.fromkeys(stages)) == ["load", "prefill", "calm", "pressed"]
        assert not any(isinstance(event, Governed) for event in events)

    def test_governed_llama_is_trimmed_and_restored_on_request(self, demo_model):
        events = []
        options = SceneOptions(model=str(demo_model), gentle=True, context_tokens=640, tokens=8)
        result = run_scene("psi", options, events.append)
        happened = [event.event for event in events if isinstance(event, Governed)]
        assert [type(event) for event in happened if isinstance(event, (Trimmed, Restored))] == [
            Trimmed,
            Restored,
        ]
        assert result.trims == 1
        assert result.bytes_returned > 2 * MIB
        assert result.restored is True
        assert result.missing_cells == 0
        assert result.stall is None


@pytest.mark.llama
@pytest.mark.cgroup
class TestPen:
    def test_a_model_that_the_kernel_kills_is_a_result(self, demo_model):
        options = SceneOptions(
            model=str(demo_model),
            context_tokens=96,
            tokens=8000,  # a cache of 180 MiB, all of it resident: the model is the larger one
            limit_bytes=360 * MIB,
            swap_bytes=0,
            pressure_bytes=250 * MIB,
        )
        result = run_scene("fixed", options)
        assert result.killed
        assert 0 <= result.tokens < 8000
        assert result.final_resident_bytes == 0
        assert result.restored is None

    def test_a_pen_too_small_for_the_model_alone_says_so(self, demo_model):
        options = SceneOptions(
            model=str(demo_model), context_tokens=96, tokens=8000, limit_bytes=128 * MIB, swap_bytes=0
        )
        with pytest.raises(PsiKvError, match="does not fit into 128 MiB"):
            run_scene("fixed", options)


@pytest.mark.slow
@pytest.mark.llama
@pytest.mark.swap
def test_under_pressure_the_governed_model_gives_back_and_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("PSI_KV_QUIET_S", "1")
    options = SceneOptions(
        model=str(write_model(tmp_path / "large.gguf", LARGE)),  # a cell takes as many bytes, a token no time
        context_tokens=2000,
        tokens=600,
        limit_bytes=150 * MIB,
        pressure_bytes=90 * MIB,
    )
    events = []
    result = run_scene("psi", options, events.append)
    assert not result.killed
    assert result.trims >= 1
    assert result.bytes_returned > 5 * MIB
    assert result.first_trim_s < 5.0
    assert result.restored is True
    ticks = [event for event in events if isinstance(event, Tick)]
    assert all(0.0 <= tick.stall <= 1.0 for tick in ticks)  # how much is left of it is the governor's matter
    assert min(tick.live_cells for tick in ticks if tick.tokens) < 2000


def test_a_file_that_is_no_model_is_bad_input(tmp_path):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"not a model")
    for path in (broken, tmp_path / "none.gguf"):
        with pytest.raises(BadInputError) as caught:
            run_scene("fixed", SceneOptions(model=str(path), gentle=True, **SMALL))
        assert "\n" not in str(caught.value)


def test_dropping_the_cache_of_a_file_leaves_the_file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10_000)
    drop_file_cache(path)
    assert path.read_bytes() == b"x" * 10_000


@given(st.integers(1, 100_000), st.integers(0, 10_000))
def test_a_context_has_cells_for_everything_and_few_more(context_tokens, decoded):
    setup = Setup(variant="fixed", model="x", context_tokens=context_tokens, decoded_tokens=decoded)
    assert context_tokens + decoded < setup.cells <= context_tokens + decoded + 256
    assert setup.cells % 256 == 0


@given(st.integers(1, 2_000_000))
def test_the_prompt_is_as_long_as_asked_and_always_the_same(n_characters):
    whole = text.prompt_text(n_characters)
    assert len(whole) == n_characters
    assert text.prompt_text(min(n_characters, 1000)) == whole[:1000]
