"""The T-FREE miniature: a small multilingual language model, and its comparison with a byte-level BPE."""
