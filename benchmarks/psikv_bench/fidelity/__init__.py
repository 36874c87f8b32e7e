"""What is lost when a part of the context is given up: the parts of the fidelity scene."""
