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
assert "locked" in reply.problem, reply
assert (reply.n_bytes, reply.written) == (0, 0), reply  # nothing is written that can't be dropped then
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

HUGE_PAGES = """
import sys
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=False, reserve_bytes=0, limit_bytes=0)
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
llm.eval([i % 240 + 5 for i in range(1500)])
def mappings():
    lines = []
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0] and lines:
            yield lines
            lines = []
        lines.append(line)
flags, huge = "", 0
for lines in mappings():
    start, stop = (int(part, 16) for part in lines[0].split()[0].split("-"))
    if stop - start > 24 << 20 and lines[0].split()[1] == "rw-p" and len(lines[0].split()) == 5:
        fields = dict(line.split(":", 1) for line in lines[1:])
        if int(fields["Anonymous"].split()[0]) > 1400 * 8:
            flags, huge = fields["VmFlags"], int(fields["AnonHugePages"].split()[0])
assert "nh" in flags.split(), flags
assert huge == 0, huge
print("pages of the system's size")
"""

TWO_VERSIONS = """
import ctypes, importlib.util, os, sys
from pathlib import Path
from psi_kv_governor.engines.llama import loader
agent = loader.load().agent
agent.configure(sys.argv[2], in_file=sys.argv[3] == "file", reserve_bytes=0, limit_bytes=0)
import llama_cpp
from psi_kv_governor.engines.llama.client import Client, InProcess, Op
os.environ["LLAMA_CPP_LIB_PATH"] = sys.argv[4]
spec = importlib.util.spec_from_file_location("second", Path(llama_cpp.__file__).with_name("llama_cpp.py"))
second = importlib.util.module_from_spec(spec)
spec.loader.exec_module(second)
mapped = Path("/proc/self/maps").read_text()
assert "libllama.so" in mapped and "libllamb.so" in mapped, "two of them"

class Context:
    def __init__(self, api):
        self.api = api
        deaf = ctypes.cast(ctypes.CDLL(None).abs, api.llama_log_callback)
        api.llama_log_set(deaf, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 2048, 256, 1, 1
        params.flash_attn_type = 1
        self.ctx = api.llama_init_from_model(self.model, params)
        self.n = 0

    def decode(self, tokens):
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.n + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        assert self.api.llama_decode(self.ctx, batch) == 0
        self.api.llama_batch_free(batch)
        self.n += len(tokens)

    def state(self):
        size = self.api.llama_state_get_size(self.ctx)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer)[: self.api.llama_state_get_data(self.ctx, buffer, size)]

one, other = Context(llama_cpp), Context(second)
client = Client(InProcess(agent.serve))
regions = client.regions(count_resident=False)
assert len(regions) == 2, regions
for i in range(8):
    for context in (one, other):
        context.decode([(i * 31 + j) % 240 + 5 for j in range(100)])
    mine = client.ask(Op.PARK, regions[0].id, 0)
    assert mine.n_bytes > 0 and not mine.problem, mine
    its = client.ask(Op.PARK, regions[1].id, -1)  # ctypes calls this one without us
    assert its.n_bytes == 0 and "not reached" in its.problem, its
    assert one.state() == other.state()
one.api.llama_free(one.ctx)
other.decode([7, 8, 9])
other.api.llama_free(other.ctx)
assert client.regions(count_resident=False) == []
print("each its own")
"""
