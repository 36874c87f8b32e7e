"""A second residence: a cache whose pages can't be returned is given back by making its context smaller.

Memory of a device is freed in whole buffers only. So what attention need not see is saved by llama.cpp into
files, the context is freed and made anew with fewer cells, and what is kept is put back in the order of its
positions; later the same with more cells. Positions stay as they are.

To be imported after `loader.load()`, like `llama_cpp` itself.
"""
