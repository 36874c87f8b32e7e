"""A chat that goes on while memory is short: the conversation's cache gives, and comes back.

python examples/chat.py MODEL.gguf
"""

import sys

from psi_kv_governor import GovernedLlama

llm = GovernedLlama(sys.argv[1], n_ctx=4096, flash_attn=True, verbose=False)
messages = [{"role": "system", "content": "You answer in one sentence."}]
with llm.governor:
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        answer = llm.create_chat_completion(messages, max_tokens=48, temperature=0.0)
        text = answer["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": text})
        print(text)
        if missed := answer.get("psi_kv"):  # only there where something was not looked at
            print(f"  ({missed['masked_tokens']} tokens were masked for it)", file=sys.stderr)
llm.close()
