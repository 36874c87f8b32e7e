"""How large a cgroup and a load have to be, from what the model takes, and the context that all starts load.

Without swap the kernel kills when memory that cannot be dropped passes the limit. The model's weights are a
mapped file: they can be dropped, and are read again at every token, so a cgroup that holds everything but
them is slow before it is deadly. Two conditions make a scene in which giving back decides:

- the whole cache and the load do not fit even without the weights:    fixed + load > limit
- the trimmed cache, the load and the weights do:  fixed - given up + weights + load <= limit - line
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.sandbox.sandbox import Sandbox, Swap
from psikv_bench import messages
from psikv_bench.host import MIB, Host
from psikv_bench.messages import Setup
from psikv_bench.options import Options
from psikv_bench.record import Say
from psikv_bench.worker import Worker

SPARE_TOKENS = 192
"""Decoded before it goes back to the end of the context: fewer than the window that is never given up (256
cells), so that the cut is always between live cells."""
SWAP_BYTES: dict[Swap, int] = {"zram": 512 * MIB, "none": 0}
"""In the cgroup, by the swap that is asked for."""
NEIGHBOUR_BYTES = 8 * MIB
"""The neighbour's interpreter and its page tables, charged to the cgroup: 7.2 to 7.9 MiB with Python 3.11."""
KILL_BYTES = 16 * MIB
"""How far the whole cache and the load are over the limit: what the kernel still finds is less than this."""
CALM_SHARE = 0.12
"""Of the limit that is free before the neighbour comes: three times the line at which trimming begins."""
_SAVE_TIMEOUT_S = 300.0
_OPEN_TIMEOUT_S = 3600.0
_CALM_TOKENS = 8


class TrialOptions(Options, frozen=True, kw_only=True):
    """What every scene of trials is asked for. None: worked out from what the model takes."""

    ctx: Annotated[int, Meta(ge=1, description="Tokens in the context.")] = 8192
    limit_mib: Annotated[int, Meta(ge=1, description="Of the cgroup [from what the model takes].")] | None = (
        None
    )
    load_mib: Annotated[int, Meta(ge=1, description="What the neighbour takes [the same].")] | None = None
    hold_s: Annotated[float, Meta(ge=0, description="How long the load is held, at least.")] = 2.0
    swap: Annotated[Swap, Meta(description="Inside of the cgroup.")] = "none"

    @property
    def given_bytes(self) -> tuple[int | None, int | None]:
        """The limit and the load that were asked for."""
        return self.limit_mib and self.limit_mib * MIB, self.load_mib and self.load_mib * MIB

    def setup(self, **more: Any) -> Setup:
        """What every start has in common."""
        return Setup(
            variant="fixed", model=self.model, context_tokens=self.ctx, decoded_tokens=SPARE_TOKENS,
            threads=self.threads or 1, **more,
        )  # fmt: skip


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What the model's process takes with a full context, decoding."""

    hard_bytes: int
    """Charged to the cgroup and not to be dropped: anonymous and kernel memory of plain llama_cpp."""
    weights_bytes: int
    """Of the mapped file: page cache, charged to the cgroup. 0 where they were read into memory instead."""
    cell_bytes: int
    context_tokens: int
    digest: str
    """Of the context's logits, by which every process that loads it is held."""

    def may_go_bytes(self, config: GovernorConfig) -> int:
        """What the governor may give up of the cache: all but its floor and what it protects."""
        floor = max(config.floor_cells, int(config.floor_share * self.context_tokens) + 1)
        kept = max(floor, config.sink_cells + config.window_cells)
        return max(0, self.context_tokens - kept) * self.cell_bytes


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The cgroup and the load of a benchmark."""

    limit_bytes: int
    load_bytes: int


def deadly(need: Need, config: GovernorConfig, limit_bytes: int | None, load_bytes: int | None) -> Sizes:
    """Sizes by which a whole cache is killed and a trimmed one is not; what is given is kept.

    Raises BadInputError where no load does both: the cache that may go has to be larger than the weights.
    """
    limit = limit_bytes or calm_limit(need)
    load = load_bytes or _whole_mib(limit - need.hard_bytes - NEIGHBOUR_BYTES + KILL_BYTES)
    sizes = _sensible(limit, load)
    if load_bytes is None and (left := trimmed_bytes(need, config, sizes)) < 0:
        raise BadInputError(
            f"with a context of {need.context_tokens} tokens a trimmed cache and the load lack "
            f"{-(left // MIB)} MiB in {sizes.limit_bytes // MIB} MiB: give a larger --ctx"
        )
    return sizes


def calm_limit(need: Need) -> int:
    """A limit in which the model alone is calm."""
    return _whole_mib((need.hard_bytes + need.weights_bytes) / (1 - CALM_SHARE))


def mild(need: Need, config: GovernorConfig, limit_bytes: int | None, load_bytes: int | None) -> Sizes:
    """Sizes by which something has to go and nobody is killed: half of what may go is asked for."""
    limit = limit_bytes or calm_limit(need)
    left = limit - need.hard_bytes - need.weights_bytes - NEIGHBOUR_BYTES
    load = load_bytes or _whole_mib(left + need.may_go_bytes(config) / 2)
    return _sensible(limit, load)


def _sensible(limit_bytes: int, load_bytes: int) -> Sizes:
    if load_bytes < MIB:
        raise BadInputError(
            f"--limit-mib {limit_bytes // MIB} leaves no load that asks for anything: give less"
        )
    return Sizes(limit_bytes=limit_bytes, load_bytes=load_bytes)


def kill_excess(need: Need, sizes: Sizes) -> int:
    """Bytes by which a whole cache and the load pass the limit without one page of the weights."""
    return need.hard_bytes + NEIGHBOUR_BYTES + sizes.load_bytes - sizes.limit_bytes


def trimmed_bytes(need: Need, config: GovernorConfig, sizes: Sizes) -> int:
    """Bytes between the trimmed cache with load and weights, and the line at which trimming begins."""
    line = int(config.headroom_low * sizes.limit_bytes)
    held = need.hard_bytes - need.may_go_bytes(config) + need.weights_bytes + NEIGHBOUR_BYTES
    return sizes.limit_bytes - line - held - sizes.load_bytes


def _whole_mib(n_bytes: float) -> int:
    return -int(-n_bytes // MIB) * MIB


@contextmanager
def prepared(setup: Setup, say: Say) -> Iterator[tuple[Setup, Need]]:
    """Decode the context once into a file without a name, and see what the model takes.

    The file is gone with this process, however it ends; it is as private as the context. Raises
    BadInputError or PsiKvError where the model can't be opened or the file can't be made.
    """
    with _nameless() as path:
        filled = _fill(setup, path, say)
        ready = msgspec.structs.replace(setup, state=path, prefill_threads=setup.threads)
        yield ready, _need(ready, filled, say)


def require_sandbox(swap: Swap) -> None:
    """Raises PsiKvError where no memory cgroup with this swap can be made, before minutes are spent."""
    able, why = Sandbox.available(swap)
    if not able:
        raise PsiKvError(f"this needs a memory cgroup of its own: {why}")


def ample_bytes() -> int:
    """Limit of a cgroup in which nothing is short: half of what is free. Raises PsiKvError."""
    found = HeadroomReader(find_cgroups()).read()
    if found is None:
        raise PsiKvError("this machine does not say how much memory is free: is /proc mounted?")
    return found.headroom_bytes // 2


def _fill(setup: Setup, path: str, say: Say) -> messages.Opened:
    with Host(setup, ample_bytes()) as host:
        opened = until_opened(host, say)
        host.order(Worker.save, path=path)
        host.until(messages.Done, _SAVE_TIMEOUT_S)
        return opened


def _need(setup: Setup, filled: messages.Opened, say: Say) -> Need:
    """Of plain llama_cpp in a cgroup that holds all of it."""
    say("measuring what the model takes", new=True)
    with Host(setup, ample_bytes()) as host:
        opened = until_opened(host, say)
        if opened.digest != filled.digest:
            raise PsiKvError("the context that was loaded is not the one that was saved: nothing to compare")
        host.order(Worker.decode, tokens=_CALM_TOKENS)
        host.until(messages.Done, _SAVE_TIMEOUT_S)
        assert host.sandbox is not None, "it has a limit"
        file_bytes = _file_bytes(host.sandbox)
        return Need(
            hard_bytes=host.sandbox.group.usage_bytes() - file_bytes,
            # Pages that another process has mapped are charged to it: then they count by their size.
            weights_bytes=max(file_bytes, Path(setup.model).stat().st_size) if setup.mmap else 0,
            cell_bytes=filled.cell_bytes,
            context_tokens=setup.context_tokens,
            digest=filled.digest,
        )


def _file_bytes(sandbox: Sandbox) -> int:
    """Page cache that is charged to it: the model's weights, which can be dropped and read again."""
    text = (sandbox.group.memory / "memory.stat").read_text()
    values = dict(line.split(maxsplit=1) for line in text.splitlines())
    return int(values.get("total_cache", values.get("file", "0")))


def until_opened(host: Host, say: Say) -> messages.Opened:
    """Wait until the model's context is full, and say how far it is."""

    def heard(message: messages.Message) -> None:
        if isinstance(message, messages.Progress) and message.stage == "prefill":
            say(f"decoding the context once, {message.done:,} of {message.total:,} tokens")

    return host.until(messages.Opened, _OPEN_TIMEOUT_S, heard)


@contextmanager
def _nameless() -> Iterator[str]:
    """A file that has no name from birth, by the path under which a child finds it while this runs."""
    folder = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # /tmp can be memory
    with tempfile.TemporaryFile(dir=folder) as file:
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"
