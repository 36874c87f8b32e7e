"""A forked child has a copy of the model, ungoverned: it neither hangs nor disturbs its parent."""

from __future__ import annotations

import pytest
from engine_help import run_python
from models import LLAMA

pytestmark = [pytest.mark.llama, pytest.mark.timeout(120)]

FORKS = """
import os, sys, threading, time
import numpy as np
from psi_kv_governor import GovernedLlama
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.ledger import SPILLED

config = GovernorConfig(sink_cells=16, window_cells=32, block_cells=16, floor_cells=32, store_dir=sys.argv[2])
llm = GovernedLlama(sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, config=config)
tokens = list(range(10, 210))
llm.eval(tokens)
spilled = llm.governor.trim(0.5).spilled
assert spilled > 0
before = llm.governor.status()

busy = threading.Event()
def decode_on():  # holds the context nearly always: some children are born in the middle of a decode
    for token in range(600):
        llm.eval([token % 200 + 5])
        busy.set()
thread = threading.Thread(target=decode_on)
thread.start()
busy.wait()

def child(how):
    llm.governor.restore()
    assert llm.governor.status().spilled_cells == 0
    llm.governor.trim(0.2)
    llm.close()
    if how == 0:
        os._exit(0)
    sys.exit(0)  # with everything that is done at an exit

children = []
for how in (0, 1) * 4:
    pid = os.fork()
    if pid == 0:
        child(how)
    children.append(pid)
    time.sleep(0.01)
end = time.monotonic() + 60
for pid in children:
    while True:
        got, status = os.waitpid(pid, os.WNOHANG)
        if got:
            assert status == 0, status
            break
        if time.monotonic() > end:
            for other in children:
                try:
                    os.kill(other, 9)
                except ProcessLookupError:
                    pass
            raise SystemExit("a child hangs")
        time.sleep(0.01)
thread.join()
assert llm.governor.status().spilled_cells == before.spilled_cells
result = llm.governor.restore()
assert (result.cells, result.missing) == (spilled, 0), result
assert any(thread.name == "psi-kv-governor" for thread in threading.enumerate())
llm.close()
print("whole")
"""


def test_children_end_and_the_parent_goes_on(tiny_model, folder):
    assert run_python(FORKS, tiny_model(LLAMA), folder, timeout_s=100).endswith("whole\n")
