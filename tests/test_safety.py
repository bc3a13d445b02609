"""The promises that conftest.py makes to every test: no network, no unpickling, no randomness."""

import io
import pickle
import random
import socket

import numpy
import pytest
import torch

from tests.support import audit

PICKLED_CLASS = pickle.dumps(io.StringIO)


def test_a_connection_that_leaves_the_machine_is_refused():
    with socket.socket() as client, pytest.raises(RuntimeError, match=r"without a network.*192\.0\.2\.1"):
        client.connect(("192.0.2.1", 80))


@pytest.mark.parametrize("address", [("127.0.0.1", 80), ("::1", 80, 0, 0), ("localhost", 1), "/run/socket"])
def test_loopback_addresses_are_allowed(address):
    assert audit.is_loopback(address)


@pytest.mark.parametrize("address", [("10.0.0.1", 80), ("huggingface.co", 443), ("2001:db8::1", 80, 0, 0)])
def test_other_addresses_are_not(address):
    assert not audit.is_loopback(address)


def test_unpickling_is_noticed_even_if_the_caller_hides_it():
    def load_and_hide() -> None:
        with audit.no_unpickling():
            try:
                pickle.loads(PICKLED_CLASS)
            except RuntimeError:
                return

    with pytest.raises(AssertionError, match=r"unpickled \['_?io.StringIO'\]"):
        load_and_hide()


def test_a_pickle_of_plain_data_is_not_what_we_forbid(no_unpickling):
    assert pickle.loads(pickle.dumps([1, "a"])) == [1, "a"]


@pytest.mark.parametrize("attempt", [1, 2])
def test_randomness_starts_the_same_in_every_test(attempt):
    drawn = random.random(), float(numpy.random.rand()), float(torch.rand(()))
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.49625658988952637))


def test_a_test_process_computes_on_one_thread():
    assert torch.get_num_threads() == 1
