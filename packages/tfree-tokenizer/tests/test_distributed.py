"""Two processes that train on halves of a batch get the loss and the gradients of one process with all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import ROOT
from tests.support.tfree import tiny_tfree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TEXTS = ["the house is small.", "das Donaudampfschiff ist klein, the", "Zwetschge ist das Haus", "House, house"]

# Launched twice by `accelerate launch`; the first process writes what it found.
WORKER = """
import json, sys
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from tests.support.tfree import tiny_tfree
from tests.test_distributed_helpers import batch_of

mode, objective, folder = sys.argv[1:]
"""


def batch_of(tokenizer, texts):
    """Ids, mask and labels; labels are -100 on padding."""
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="right"))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
