"""The scene: what it measures, what it makes of a kill, and that nothing of it stays behind."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_models import LARGE, write_model
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Released, Restored, Trimmed
from psi_kv_governor.sandbox import text
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import drop_file_cache
from psi_kv_governor.sandbox.scene import Scene, run_scene
from psi_kv_governor.sandbox.scene_options import Said, SceneOptions, Tick
from sandbox_help import leftovers

SMALL = {"context_tokens": 96, "tokens": 8}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = leftovers()
    yield
    assert [entry for entry in leftovers() if entry not in before] == []


class Told:
    """A model's process of which only what it says is there: one batch each time that it is listened to."""

    pid, ended = -1, False

    def __init__(self, *batches):
        self.batches = list(batches)

    def send(self, line):
        assert line

    def hear(self, timeout_s):
        self.ended = not self.batches
        return [] if self.ended else self.batches.pop(0)

    def wait(self):
        return -9

    def killed(self, what):
        return True


class Full:
    """A sandbox in which the kernel kills."""

    pressure_file, popen = None, subprocess.Popen

    @property
    def group(self):
        return self

    def oom_kills(self):
        return 1


def stage(name, *times_s, total=None):
    """Its beginning and each of its tokens."""
    total = total or len(times_s) - 1
    return [Said(time_s=time_s, stage=name, done=n, total=total) for n, time_s in enumerate(times_s)]


def event(happened):
    return Said(time_s=happened.time_s, stage="pressed", event=happened, live_cells=602)


CALM = [Said(time_s=0.0, stage="prefill", done=1000, total=1000), *stage("calm", *(n / 4 for n in range(17)))]
TRIMMED = event(Trimmed(time_s=12.5, cells=400, masked=400, bytes_returned=70, seconds=0.1, reason="why"))


class TestFigures:
    """What comes of what the model says, without one."""

    def scene(self, *batches, sandbox=None):
        options = SceneOptions(model="x", gentle=sandbox is None, pressure_bytes=MIB, step_bytes=MIB)
        return Scene("psi", options, Told(CALM, *batches), sandbox, lambda event: None)

    def test_they_are_of_its_tokens_under_pressure(self):
        begin, first, second = stage("pressed", 12.0, 12.1, 12.3)
        events = [TRIMMED, event(Released(time_s=13.0, bytes_returned=7))]
        end = Said(time_s=20.0, stage="end", missing_cells=0, on_request=True)
        scene = self.scene([begin, first], [*events, second, *stage("restore", 12.4)], [end])
        found = scene.play()
        assert (found.tokens, found.calm_tokens_per_s) == (2, 4.0)
        assert found.tokens_per_s == pytest.approx(2 / found.seconds)
        assert (found.p50_s, found.p99_s) == pytest.approx((0.1, 0.2))
        assert (found.trims, found.bytes_returned, found.first_trim_s) == (1, 77, None)  # without a neighbour
        assert (found.killed, found.restored, found.restored_on_request) == (False, True, True)
        assert scene.live_cells == 603

    def test_a_trim_on_order_is_no_part_of_a_token(self):
        again = Said(time_s=19.0, stage="pressed", done=1, total=2)
        said = [*stage("pressed", 12.0, 12.1, total=2), again, Said(time_s=19.1, stage="pressed", done=2)]
        end = Said(time_s=20.0, stage="end", missing_cells=7, on_request=True)
        found = self.scene([*said, *stage("restore", 19.2)], [TRIMMED, end]).play()
        assert found.p99_s == pytest.approx(0.1)
        assert (found.restored, found.missing_cells) == (False, 7)

    def test_one_that_is_killed_before_its_first_token_has_no_latency(self):
        found = self.scene([TRIMMED], sandbox=Full()).play()
        assert (found.killed, found.tokens, found.p99_s, found.restored) == (True, 0, None, False)
        assert 0.0 < found.seconds < 60.0

    def test_one_that_is_killed_by_somebody_else_is_no_result(self):
        with pytest.raises(PsiKvError, match="not for want of memory"):
            self.scene().play()


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
        said = [event for event in events if isinstance(event, Said)]
        stages = ["load", "prefill", "calm", "pressed", "restore", "end"]
        assert list(dict.fromkeys(one.stage for one in said)) == stages
        assert not any(one.event for one in said)

    def test_governed_llama_is_trimmed_and_restored_on_request(self, wide_model):
        events = []
        options = SceneOptions(model=str(wide_model), gentle=True, context_tokens=640, tokens=8)
        result = run_scene("psi", options, events.append)
        happened = [event.event for event in events if isinstance(event, Said)]
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
        tokens=1500,  # a second at the least, and all is taken in a third of that
        limit_bytes=150 * MIB,
        pressure_bytes=90 * MIB,
    )
    events = []
    result = run_scene("psi", options, events.append)
    assert not result.killed
    assert result.trims >= 1
    assert result.bytes_returned > 5 * MIB
    assert 0.0 < result.first_trim_s < 60.0  # how soon is also a matter of what else the machine does
    assert result.restored is True
    ticks = [event for event in events if isinstance(event, Tick)]
    assert all(0.0 <= tick.stall <= 1.0 for tick in ticks)  # how much is left of it is the governor's matter
    assert any(tick.live_cells < 2000 + tick.tokens for tick in ticks if tick.tokens)


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


@given(st.integers(1, 2_000_000))
def test_the_prompt_is_as_long_as_asked_and_always_the_same(n_characters):
    whole = text.prompt_text(n_characters)
    assert len(whole) == n_characters
    assert text.prompt_text(min(n_characters, 1000)) == whole[:1000]
