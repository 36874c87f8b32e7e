"""What the kernel says and does, in thin wrappers without an opinion: mounts, and the memory of a process."""
