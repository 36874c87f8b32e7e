"""The native part: found or compiled, and what of it needs no llama.cpp."""
