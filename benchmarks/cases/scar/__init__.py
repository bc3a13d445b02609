"""SCAR: steering and detection by a few latents beside the whole coder, and what steering adds to generation."""

from benchmarks.cases.scar import coder as coder
from benchmarks.cases.scar import generate as generate
from benchmarks.cases.scar import steer as steer
