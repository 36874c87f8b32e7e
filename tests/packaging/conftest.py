"""Servers that somebody else wrote are had in tests/service/servers.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "service"))
