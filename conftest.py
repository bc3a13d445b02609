"""Setup of every test session: a loopback Hub in place of the network, one thread, seeded randomness."""

import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.hub.server import LoopbackHub
from tests.support import audit

_HUB = pytest.StashKey[LoopbackHub]()
_HOME = pytest.StashKey[str]()
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    if "huggingface_hub" in sys.modules:
        raise pytest.UsageError("huggingface_hub was imported before conftest.py; it reads HF_ENDPOINT at import.")
    audit.install()
    hub, home = LoopbackHub(), tempfile.mkdtemp(prefix="hf-home-")
    hub.start()
    os.environ.update(hub.environment(home))
    config.stash[_HUB], config.stash[_HOME] = hub, home


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_HUB].stop()
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> LoopbackHub:
    """The Hub that every client of this process talks to."""
    return request.config.stash[_HUB]


@pytest.fixture
def repo_id() -> str:
    """The name of a repository that does not exist yet."""
    return f"user/repository-{next(_numbers)}"


@pytest.fixture
def no_unpickling() -> Iterator[None]:
    """The test fails if it unpickles anything."""
    with audit.no_unpickling():
        yield
