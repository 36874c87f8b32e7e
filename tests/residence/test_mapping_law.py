"""Whatever is parked, brought back, written and released in whatever order: bytes are as in plain memory."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Mapping

PAGES = 24
SPAN = st.tuples(st.integers(0, PAGES * PAGE_BYTES), st.integers(0, PAGES * PAGE_BYTES)).map(sorted)
STEP = st.tuples(
    st.sampled_from(["write", "write", "park", "unpark", "release", "write_behind"]),
    SPAN,
    st.integers(1, 255),
)


@settings(max_examples=60)
@given(backing=st.sampled_from(["file", "memory"]), steps=st.lists(STEP, max_size=25))
def test_a_mapping_is_memory(place, backing, steps):
    mapping = Mapping(PAGES * PAGE_BYTES, backing=backing, place=place)
    view = np.frombuffer(mapping.buffer, dtype=np.uint8)
    plain = np.zeros(PAGES * PAGE_BYTES, dtype=np.uint8)
    for verb, (start, stop), value in steps:
        if verb == "write":
            view[start:stop] = plain[start:stop] = value
            continue
        before = mapping.resident_bytes()
        done = getattr(mapping, verb)([(start, stop)])
        assert done.problem == ""
        if verb == "release":  # zeros from now on, on whole pages
            first, last = -(-start // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES
            plain[first : max(first, last)] = 0
        if verb == "park":
            assert 0 <= done.bytes_returned <= before - mapping.resident_bytes()
        if value % 3 == 0:
            np.testing.assert_array_equal(view, plain)
    # Not so of a part: what the kernel keeps as one (a large folio) it drops together or not at all.
    assert mapping.park([(0, PAGES * PAGE_BYTES)]).problem == ""
    assert mapping.resident_bytes() == 0
    np.testing.assert_array_equal(view, plain)
    mapping.close()
