"""LangChain's own LlamaCpp, governed: one import, and its conversations give memory back like any other.

pip install 'psi-kv-governor[llama]' langchain-community
python examples/langchain_llm.py MODEL.gguf
"""

import sys
import time

from langchain_community.llms import LlamaCpp
from langchain_core.prompts import PromptTemplate

import psi_kv_governor.auto as psi_kv  # before llama_cpp is imported: LangChain does so late

llm = LlamaCpp(model_path=sys.argv[1], n_ctx=2048, n_batch=512, max_tokens=8, temperature=0.0, verbose=False)
chain = PromptTemplate.from_template("{story} In one word, the animal was a") | llm

story = "A fox crossed the river and slept under the old oak. " * 40
first = chain.invoke({"story": story})

# Two seconds after its last token a conversation counts as idle.
time.sleep(2.5)
# By hand what happens by itself under pressure, to a conversation that nobody is decoding.
parked = psi_kv.governor.park()
print(f"parked: {parked.bytes_returned >> 20} MiB")
again = chain.invoke({"story": story})
print(f"the same answer: {again == first}")
psi_kv.governor.close()
