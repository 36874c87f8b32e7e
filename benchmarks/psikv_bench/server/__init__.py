"""A server of somebody else's in a container's limit: what is started, asked and drawn."""
