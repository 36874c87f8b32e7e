"""What recall may do, and what it did: for all caches of an engine together."""

from __future__ import annotations

import threading
import time

from psi_kv_governor.cache import Recall, Recalled
from psi_kv_governor.native.summaries import prepare

_PATIENCE_S = 1.0


class Ledger:
    """What all caches of an engine have in common: what they may do, and what they did."""

    def __init__(self) -> None:
        self.settings = Recall()
        self.read_bytes = self.blocks = self.exchanges = self.decoded_again = 0
        self.why_not = "the native part is being built"
        """Why there are no summaries; '' where there can be."""
        self._bucket_bytes, self._bucket_s = 0.0, 0.0
        self._preparing: threading.Thread | None = None

    def prepare(self) -> None:
        """Have the native part, which may have to be compiled: nobody waits long for that."""
        if self._preparing is None:
            self._preparing = threading.Thread(target=self._prepare, name="psi-kv-native", daemon=True)
            self._preparing.start()
            self._preparing.join(_PATIENCE_S)

    def _prepare(self) -> None:
        try:
            prepare()
            self.why_not = ""
        except Exception as error:
            self.why_not = str(error)

    def allowed_bytes(self) -> float:
        """That may be read now."""
        now_s, most = time.monotonic(), self.settings.bytes_per_s
        saved = self._bucket_bytes + (now_s - self._bucket_s) * most if self._bucket_s else most
        self._bucket_bytes, self._bucket_s = min(most, saved), now_s
        return self._bucket_bytes

    def enter(self, n_bytes: int, blocks: int) -> None:
        """So much was read."""
        self._bucket_bytes -= n_bytes
        self.read_bytes += n_bytes
        self.blocks += blocks
        self.exchanges += 1

    def recalled(self, summary_bytes: int, why_not: str) -> Recalled:
        """In the words of the contract."""
        return Recalled(
            read_bytes=self.read_bytes,
            blocks=self.blocks,
            exchanges=self.exchanges,
            decoded_again=self.decoded_again,
            summary_bytes=summary_bytes,
            why_not=why_not,
        )
