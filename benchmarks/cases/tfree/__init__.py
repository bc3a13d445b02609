"""T-FREE from text to words and back: what it costs beside BPE, `embedding_bag`, dense targets and the original."""

from benchmarks.cases.tfree import decode as decode
from benchmarks.cases.tfree import dictionary as dictionary
from benchmarks.cases.tfree import embedding as embedding
from benchmarks.cases.tfree import head as head
from benchmarks.cases.tfree import text as text
