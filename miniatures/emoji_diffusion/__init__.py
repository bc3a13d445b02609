"""Emoji diffusion: a small text-to-image model of the Stable Diffusion layout, for tests of image editing."""
