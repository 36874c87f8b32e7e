"""What the tests of transformers share: models, and a place to park.

They need torch and transformers: `make test-transformers` runs them in an environment of its own. Without,
only the tests that need neither are collected.
"""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_[!p]*.py"]
else:
    import torch
    from tiny import tiny_model

    from psi_kv_governor.engines.transformers import engine as engine_module
    from psi_kv_governor.engines.transformers import ledger
    from psi_kv_governor.engines.transformers.engine import TransformersEngine
    from psi_kv_governor.native import summaries
    from psi_kv_governor.residence import Place, find_place
    from waiting import PATIENCE_S

    @pytest.fixture(scope="session")
    def place() -> Place:
        search = find_place(reserve_bytes=0)
        assert search.place is not None, search.why_none
        return search.place

    @pytest.fixture(scope="session")
    def native_part():
        """Compiled before, so that nobody has to wait for it."""
        summaries.prepare()

    @pytest.fixture(scope="session", autouse=True)
    def patient():
        """A machine that is busy may have a thread stand still for longer than a governor waits for it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "PATIENCE_S", PATIENCE_S)  # for a pass that runs
            patch.setattr(ledger, "_PATIENCE_S", PATIENCE_S)  # for the native part, compiled or not
            yield

    @pytest.fixture
    def model():
        return tiny_model()

    @pytest.fixture
    def engine(place):
        made = TransformersEngine(place)
        yield made
        made.close()

    @pytest.fixture(autouse=True)
    def quiet_torch():
        """One thread: the machine may be busy, and results must not hang on how work is split."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        with torch.no_grad():
            yield

    @pytest.fixture(scope="session")
    def demo_gguf(demo_model: Path) -> Iterator[dict[str, str]]:
        """Where transformers find the demo model. Its file is read for the tokenizer, for the configuration
        and for the weights: here once for all, since each time takes 8 s of a processor."""
        import gguf

        with pytest.MonkeyPatch.context() as patch:
            for name in ("GGUFReader", "get_tensor_name_map"):
                patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
            yield {"pretrained_model_name_or_path": str(demo_model.parent), "gguf_file": demo_model.name}

    @pytest.fixture(scope="session")
    def demo(demo_gguf):
        """The real demo model, of 30 layers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(**demo_gguf, dtype=torch.float32).eval()
