"""Surroundings in which a model has to live: what is hostile in them, and who survives."""
