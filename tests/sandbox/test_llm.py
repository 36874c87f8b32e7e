"""Plain llama.cpp is plain."""

from __future__ import annotations

import pytest

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import llm


class TestPlain:
    def maps(self, tmp_path, *files: str):
        path = tmp_path / "maps"
        path.write_text("".join(f"7f00-7f01 r-xp 00000000 fe:00 11    {file}\n" for file in files))
        return path

    def test_one_llama_is_plain(self, tmp_path):
        llm.check_plain(self.maps(tmp_path, "/a/psi-kv-governor/.venv/libllama.so", "/lib/libc.so.6"))
        llm.check_plain(tmp_path / "no such file")

    @pytest.mark.parametrize(
        "files", [("/a/libllama.so", "/b/libllama.so.0"), ("/a/libllama.so", "/b/libpsikv.so")]
    )
    def test_an_agent_in_front_of_it_is_not(self, tmp_path, files):
        with pytest.raises(PsiKvError, match="not plain"):
            llm.check_plain(self.maps(tmp_path, *files))
