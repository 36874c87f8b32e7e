"""Write the demo model in the form of Hugging Face, for engines that read no GGUF, with transformers.

python scripts/convert_demo_model.py build/model
"""

from __future__ import annotations

import sys
from pathlib import Path

from psi_kv_governor.model import demo_model_path


def convert(to: Path, layers: int = 0) -> None:
    """Read the demo GGUF, and write config, weights (bfloat16) and tokenizer into the folder `to`; only the
    first `layers` where a number is given."""
    import torch

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = demo_model_path()
    folder, name = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Made anew from its parts: save_pretrained refuses a model that was read from a GGUF.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict(), strict=not layers)
    plain.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(to)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
