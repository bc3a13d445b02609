"""SCAR adapters on the T-FREE miniature: two concepts, and how well they are detected and steered."""
