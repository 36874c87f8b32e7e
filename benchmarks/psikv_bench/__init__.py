"""The benchmarks of PSI KV Governor: what is promised, measured beside what is asked (`psi-kv bench`)."""
