"""`python -m psi_kv_governor.cli` is `psi-kv`."""

from psi_kv_governor.cli import main

main(prog_name="psi-kv")
