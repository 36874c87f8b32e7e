"""After a fork neither process sees what the other writes, and both read what was there."""

import numpy as np
import pytest
from residence_help import in_child

from psi_kv_governor.residence import Mapping

MIB = 1 << 20


@pytest.mark.parametrize("backing", ["file", "memory"])
@pytest.mark.parametrize("parked", ["all", "half", "nothing"])
def test_neither_process_sees_the_others_later_writes(place, backing, parked):
    mapping = Mapping(4 * MIB, backing=backing, place=place)
    view = np.frombuffer(mapping.buffer, dtype=np.uint8)
    view[:] = np.random.default_rng(3).integers(0, 256, len(view), dtype=np.uint8)
    mapping.park({"all": [(0, 4 * MIB)], "half": [(MIB, 3 * MIB)], "nothing": []}[parked])
    theirs = view.copy()
    theirs[MIB - 100 : MIB + 100] = 1
    ours = view.copy()
    ours[2 * MIB - 100 : 2 * MIB + 100] = 2

    def child() -> str:
        view[MIB - 100 : MIB + 100] = 1
        for _ in range(2):
            done = mapping.park([(0, 4 * MIB)])
            if not np.array_equal(view, theirs):
                return "the child reads something else"
        mapping.release([(0, MIB)])
        mapping.close()
        return f"{done.problem or 'right'}"

    assert in_child(child) == "right"
    view[2 * MIB - 100 : 2 * MIB + 100] = 2
    done = mapping.park([(0, 4 * MIB)])
    assert (done.problem, mapping.resident_bytes()) == ("", 0)
    np.testing.assert_array_equal(view, ours)
    assert in_child(lambda: str(np.array_equal(view, ours))) == "True"
    mapping.close()


def test_writes_of_the_parent_are_not_seen_by_a_child_that_reads_late(place):
    import os

    mapping = Mapping(MIB, backing="file", place=place)
    view = np.frombuffer(mapping.buffer, dtype=np.uint8)
    view[:] = 1
    mapping.park([(0, MIB)])
    reader, writer = os.pipe()
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)  # until the parent has written and parked again
        os.write(answer, b"right" if (view == 1).all() else b"wrong")
        os._exit(0)
    view[:] = 2
    mapping.park([(0, MIB)])
    mapping.release([(0, MIB // 2)])
    os.write(writer, b"!")
    assert os.read(answers, 9) == b"right"
    os.waitpid(child, 0)
    for descriptor in (reader, writer, answers, answer):
        os.close(descriptor)
    mapping.close()
