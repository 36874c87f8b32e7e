"""One folder an engine. No engine knows another."""
