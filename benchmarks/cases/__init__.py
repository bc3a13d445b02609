"""All cases, one folder per package; importing this fills the registry of the harness."""

from benchmarks.cases import atman as atman
from benchmarks.cases import scar as scar
from benchmarks.cases import tfree as tfree
