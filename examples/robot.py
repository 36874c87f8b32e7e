"""A robot's loop with a deadline: a sentence about what it sees, or none, but the arm moves in time.

    python examples/robot.py MODEL.gguf [CYCLES]

Before each cycle it asks whether memory is short. If it is, the cache is held to a quarter, which decodes
faster, and the words are fewer.
"""

import sys
import time

from psi_kv_governor import GovernedLlama

CYCLE_S = 2.0
llm = GovernedLlama(sys.argv[1], n_ctx=2048, flash_attn=True, verbose=False)
missed = 0
for cycle in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
    due_s = time.monotonic() + CYCLE_S
    tight = not llm.governor.has_room()
    llm.governor.limit(0.25 if tight else None)
    words = []
    for part in llm.create_completion(
        f"Cycle {cycle}. The camera sees a red cup on a table. The robot", max_tokens=24, stream=True
    ):
        words.append(part["choices"][0]["text"])
        if time.monotonic() > due_s - 0.1 or (tight and len(words) >= 8):
            break  # what is said so far has to do
    late_s = time.monotonic() - due_s
    missed += late_s > 0
    print(f"{cycle}: {'tight' if tight else 'room'}, {len(words)} tokens, {-late_s:.2f} s to spare")
    time.sleep(max(0.0, -late_s))
print(f"{missed} deadlines missed")
llm.close()
