"""How well a model still answers when part of its context is given up: policies against the full cache."""
