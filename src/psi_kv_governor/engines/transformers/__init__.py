"""transformers: caches whose memory can be given back, and the contract of an engine on top of them."""
