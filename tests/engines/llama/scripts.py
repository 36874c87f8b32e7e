"""Programs that a test runs in a process of its own: what they do would last beyond the test."""

FORK = """
import ctypes, os, sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp, numpy as np
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
client = Client(InProcess(agent.serve))

def open_():
    small = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return llama_cpp.Llama(sys.argv[1], flash_attn=True, **small)

def state(llm):
    size = llama_cpp.llama_state_get_size(llm.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer)[: llama_cpp.llama_state_get_data(llm.ctx, buffer, size)]

tokens = [i % 240 + 5 for i in range(1500)]
llm, parent_way, child_way = open_(), open_(), open_()
for one in (llm, parent_way, child_way):
    one.eval(tokens[:600])
region = client.regions(count_resident=False)[0].id
assert client.ask(Op.PARK, region, 0, ranges=[(0, 300)]).n_bytes > 0

parent_way.eval(tokens[700:900])
child_way.eval(tokens[1000:1300])
to_child, to_parent = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    try:
        os.read(to_child[0], 1)  # the parent has decoded on by now
        assert state(llm)[:] != state(parent_way)
        llm.eval(tokens[1000:1300])
        assert state(llm) == state(child_way), "the child sees what its parent wrote"
        os.write(to_parent[1], b"x")
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
llm.eval(tokens[700:900])
os.write(to_child[1], b"x")
os.read(to_parent[0], 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert state(llm) == state(parent_way), "the parent sees what its child wrote"
reply = client.ask(Op.PARK, region, 0)
assert reply.problem == "" and reply.cells == 800, reply
assert state(llm) == state(parent_way)
print("both whole")
"""

FILTERED = """
import ctypes, os, struct, sys
# A seccomp filter that kills at mincore, as a unit with SystemCallFilter=@system-service does.
libc = ctypes.CDLL(None, use_errno=True)
MINCORE = {"x86_64": 27, "aarch64": 232}[os.uname().machine]
filters = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, MINCORE), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)))
code = ctypes.create_string_buffer(filters)
program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(1500)])
client = Client(InProcess(agent.serve))
region = client.regions(count_resident=True)[0]
assert region.resident > 1400 * region.cell_bytes, region
reply = client.ask(Op.PARK, region.id, 0)
assert reply.problem == "" and reply.n_bytes > 1400 * region.cell_bytes, reply
print("alive")
"""

BATCHES = """
import sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp
for n_batch in (1, 2, 7):
    llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=n_batch, n_threads=1, verbose=False)
    print(llm("a b c", max_tokens=4, temperature=0)["choices"][0]["text"])
    llm.close()
print("all sizes")
"""

LIMITED = """
import resource, sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(1500)])
client = Client(InProcess(agent.serve))
(region,) = client.regions(count_resident=True)
assert not region.in_file
reply = client.ask(Op.PARK, region.id, 0)
assert reply.n_bytes == 0 and "too large" in reply.problem, reply
llm.eval([5])
print("runs on")
"""

OWN_LIBRARY = """
import os, sys
from pathlib import Path
import importlib.util
os.environ["LLAMA_CPP_LIB_PATH"] = sys.argv[2]
from psi_kv_governor.engines.llama import loader
loaded = loader.load()
assert os.environ["LLAMA_CPP_LIB_PATH"] == sys.argv[2]
import llama_cpp
mapped = Path("/proc/self/maps").read_text()
assert str(Path(sys.argv[2]).resolve() / "libllama.so") in mapped
llm = llama_cpp.Llama(sys.argv[1], n_ctx=2048, n_threads=1, verbose=False)
from psi_kv_governor.engines.llama.client import Client, InProcess
assert len(Client(InProcess(loaded.agent.serve)).regions(count_resident=False)) == 1
print("governed all the same")
"""

IMPORTED_BEFORE = """
import sys
import llama_cpp
from psi_kv_governor.engines.llama import loader
loaded = loader.load()
assert loaded.agent is None and "psi_kv_governor.auto" in loaded.why, loaded.why
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False)
llm.eval([5, 6])
print("plain")
"""

LOCKED = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
tokens = [i % 240 + 5 for i in range(1500)]
llm.eval(tokens)
assert libc.mlockall(1) == 0
client = Client(InProcess(agent.serve))
(region,) = client.regions(count_resident=True)
reply = client.ask(Op.PARK, region.id, 0)
after = client.regions(count_resident=True)[0].resident
assert reply.n_bytes <= region.resident - after + 4096, (reply, region.resident, after)
assert reply.n_bytes or "locked" in reply.problem, reply
print(reply.problem)
libc.munlockall()
llm.eval(tokens[:5])
print("runs on")
"""

MANY_MAPPINGS = """
import ctypes, mmap, sys
from pathlib import Path
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=False, reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
tokens = [i % 240 + 5 for i in range(1500)]
llm.eval(tokens)
def state():
    size = llama_cpp.llama_state_get_size(llm.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer)[: llama_cpp.llama_state_get_data(llm.ctx, buffer, size)]
whole = state()
client = Client(InProcess(agent.serve))
(region,) = client.regions(count_resident=True)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
most = int(Path("/proc/sys/vm/max_map_count").read_text())
base = libc.mmap(None, 4096 * 2 * most, 1, 0x4022, -1, 0)
i = 0
while libc.mprotect(base + 4096 * (2 * i + 1), 4096, 3) == 0:
    i += 1
reply = client.ask(Op.PARK, region.id, 0)
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munmap(base, 4096 * 2 * most)
assert "max_map_count" in reply.problem or reply.n_bytes > 0, reply
assert state() == whole
print("whole")
"""
