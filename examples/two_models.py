"""Two models beside each other: the one that is not being talked to gives first.

python examples/two_models.py MODEL.gguf [OTHER.gguf]
"""

import sys
import time

from psi_kv_governor import GovernedLlama

options = {"n_ctx": 2048, "flash_attn": True, "verbose": False}
busy = GovernedLlama(sys.argv[1], **options)
idle = GovernedLlama(sys.argv[-1], **options)
text = "The quick brown fox jumps over the lazy dog. " * 60
for llm in (idle, busy):
    llm.create_completion(text, max_tokens=1)

# Two seconds after its last token a conversation counts as idle.
time.sleep(2.5)
# By hand what the governor does by itself under pressure. Nothing is lost: whoever goes on reads it back.
result = idle.governor.park()
for name, llm in (("idle", idle), ("busy", busy)):
    print(f"{name}: {llm.governor.status().parked_bytes >> 20} MiB parked")
print(f"returned: {result.bytes_returned >> 20} MiB")
answer = idle.create_completion(text + "Then", max_tokens=4, temperature=0.0)["choices"][0]["text"]
print(f"idle goes on: {answer!r}")
for llm in (idle, busy):
    llm.close()
