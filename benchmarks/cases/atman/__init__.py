"""AtMan: what an explanation costs beside passes one by one, whole rows in batches, captum and inseq."""

from benchmarks.cases.atman import attention as attention
from benchmarks.cases.atman import explain as explain
from benchmarks.cases.atman import peers as peers
