"""States that a Python program saves (`LlamaRAMCache`): upstream's bytes, in memory that can be parked."""

from __future__ import annotations

import functools
import gc
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import held_memory
from fakes import FakeSource
from gguf_models import LARGE, LLAMA
from major_faults import major_faults_of
from psi_kv_governor import GovernedLlama, GovernorConfig
from psi_kv_governor.cache import Plan, Step, Verb
from psi_kv_governor.engines.llama.states import FIRST_ID, StateMismatchError

pytestmark = pytest.mark.llama
SMALL = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPT = "the cat sat on the mat and it was " * 20
GREEDY = {"max_tokens": 6, "temperature": 0.0}


@pytest.fixture
def open_llm(open_tiny):
    return functools.partial(open_tiny, {}, SMALL)


def plain(tiny_model, **arguments):
    import llama_cpp

    return llama_cpp.Llama(str(tiny_model(LARGE)), **{**SMALL, **arguments})


def text_of(result) -> str:
    return result["choices"][0]["text"]


def states_of(llm):
    return [blob for cache in llm.governor.engine.snapshot().caches for blob in cache.blobs]


def test_a_saved_state_has_upstream_s_bytes_and_is_pickled_as_them(open_llm, tiny_model):
    ours, theirs = open_llm(), plain(tiny_model)
    for llm in (ours, theirs):
        llm.eval(llm.tokenize(PROMPT.encode()))
    saved, upstream = ours.save_state(), theirs.save_state()
    assert saved.llama_state == upstream.llama_state
    assert saved.llama_state_size == upstream.llama_state_size == len(saved.llama_state)
    # Without logits_all nothing writes them: they are what was in that memory, NaN too.
    assert np.array_equal(saved.scores, ours.scores[: ours.n_tokens], equal_nan=True)
    copied = pickle.loads(pickle.dumps(saved))
    assert type(copied.llama_state) is bytes
    theirs.load_state(copied)
    ours.load_state(upstream)
    assert text_of(ours(PROMPT, **GREEDY)) == text_of(theirs(PROMPT, **GREEDY))


def test_a_parked_state_that_is_loaded_is_read_at_once_and_not_page_by_page(open_llm):
    llm = open_llm()
    llm.eval(llm.tokenize(PROMPT.encode()))
    saved = llm.save_state()
    [state] = states_of(llm)
    assert state.n_bytes > 256 * 4096
    resident = major_faults_of(lambda: llm.load_state(saved))  # the cache's own: it was cleared first
    assert llm.governor.engine.apply(Plan(steps=(Step(verb=Verb.PARK, blob=state.id),))).bytes_returned
    assert major_faults_of(lambda: llm.load_state(saved)) - resident < state.n_bytes // 4096 // 4


def test_old_states_of_a_ram_cache_go_before_any_live_context(open_llm, tiny_model):
    """204 MiB of them were kept while 4 MiB of live context were given."""
    import llama_cpp

    llm = open_llm(flash_attn=True)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    prompts = [f"{word} " + PROMPT for word in ("one", "two", "three", "four")]
    first = [text_of(llm(prompt, **GREEDY)) for prompt in prompts]
    states = states_of(llm)
    assert len(states) == 4
    assert all(state.id >= FIRST_ID and not state.parked for state in states)
    total = sum(state.n_bytes for state in states)
    result = llm.governor.park()
    assert result.bytes_returned > 0.95 * total
    assert result.masked == 0
    assert all(state.parked for state in states_of(llm))
    again = [text_of(llm(prompt, **GREEDY)) for prompt in prompts]
    assert again == first
    del llm.cache, states
    llm.set_cache(None)
    gc.collect()
    assert states_of(llm) == []


def test_the_loop_parks_them_as_soon_as_they_are_whole(open_llm):
    import llama_cpp

    llm = open_llm()
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm(PROMPT, **GREEDY)
    assert not states_of(llm)[0].parked
    llm.governor.step()
    assert states_of(llm)[0].parked


SAVES = """
import sys
from psi_kv_governor import GovernedLlama, GovernorConfig
sys.path.insert(0, sys.argv[3])
import llama_cpp
from held_memory import held_bytes
config = GovernorConfig(place=sys.argv[2], backing="file", status_socket=False)
llm = GovernedLlama(sys.argv[1], config=config,
    auto=False, n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False)
llm.eval([i % 240 + 5 for i in range(3500)])
before = held_bytes()
state = llm.save_state()
assert len(state.llama_state) > 3500 * 8192
print(held_bytes() - before)
"""


def test_saving_one_takes_no_memory_that_the_kernel_could_not_take_again(tiny_model, folder):
    """Upstream holds three copies of it, and as many rows of logits as a batch has tokens."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SAVES,
            str(tiny_model(LARGE)),
            str(folder),
            str(Path(held_memory.__file__).parent),
        ],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 2 << 20  # of a state of 28 MB


def test_a_disk_cache_of_another_kind_of_cache_is_a_miss_and_said_once_in_a_line(
    open_llm, tiny_model, folder, caplog
):
    """Written without flash attention, read with it: upstream raises out of the request."""
    import llama_cpp

    writer = plain(tiny_model)
    writer.set_cache(llama_cpp.LlamaDiskCache(str(folder / "cache")))
    writer(PROMPT, **GREEDY)
    writer.close()
    reader, theirs = open_llm(flash_attn=True), plain(tiny_model, flash_attn=True)
    reader.set_cache(llama_cpp.LlamaDiskCache(str(folder / "cache")))
    assert text_of(reader(PROMPT, **GREEDY)) == text_of(theirs(PROMPT, **GREEDY))
    said = [record.getMessage() for record in caplog.records if "saved state" in record.getMessage()]
    assert len(said) == 1
    assert "flash" in said[0]
    assert "\n" not in said[0]


def test_a_state_of_another_model_leaves_a_usable_one(open_llm, tiny_model):
    other = open_llm(LLAMA)
    other.eval(other.tokenize(PROMPT.encode()))
    llm, theirs = open_llm(), plain(tiny_model)
    llm.eval(llm.tokenize(PROMPT.encode()))
    with pytest.raises(StateMismatchError, match="another model") as raised:
        llm.load_state(other.save_state())
    assert isinstance(raised.value, RuntimeError)
    assert text_of(llm(PROMPT, **GREEDY)) == text_of(theirs(PROMPT, **GREEDY))


def test_without_a_place_states_are_saved_all_the_same(tiny_model, monkeypatch):
    from psi_kv_governor.engines.llama import process

    monkeypatch.setattr(
        process, "choose", lambda config: process.Chosen("", "memory", "there is no place to park")
    )
    llm = GovernedLlama(
        str(tiny_model(LARGE)),
        config=GovernorConfig(status_socket=False),
        auto=False,
        source=FakeSource(),
        **SMALL,
    )
    park = llm.governor.engine.describe().capabilities.park
    assert park.why == "there is no place to park"  # also before any cache was looked at
    llm.eval(llm.tokenize(PROMPT.encode()))
    state = llm.save_state()
    text = text_of(llm(PROMPT, **GREEDY))
    llm.load_state(state)
    assert text_of(llm(PROMPT, **GREEDY)) == text
    assert not llm.governor.engine.describe().capabilities.blobs.able
    llm.close()
