"""When the auto classes of transformers learn about T-FREE."""

import sys

import pytest
import transformers.models.auto.configuration_auto  # noqa: F401 (the auto classes are in use)

from tests.support.processes import run_python
from tfree_tokenizer import auto_registration

KNOWN = """
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, TOKENIZER_MAPPING
config = CONFIG_MAPPING["tfree"]
assert AutoModelForCausalLM._model_mapping[config].__name__ == "TFreeForCausalLM"
assert config in TOKENIZER_MAPPING._extra_content
"""
ORDERS = [
    "import tfree_tokenizer; from transformers import AutoTokenizer",
    pytest.param("from transformers import AutoTokenizer; import tfree_tokenizer", marks=pytest.mark.slow),
    pytest.param("import tfree_tokenizer; from transformers import LlamaForCausalLM", marks=pytest.mark.slow),
    pytest.param("import tfree_tokenizer; from transformers import pipeline", marks=pytest.mark.slow),
    pytest.param("import tfree_tokenizer, peft", marks=pytest.mark.slow),
    pytest.param("from tfree_tokenizer import TFreeTokenizer", marks=pytest.mark.slow),
    pytest.param("from tfree_tokenizer import register; register(); register()", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_tfree_in_whatever_order_things_are_imported(order):
    run_python(order + KNOWN)


def test_registration_happens_once_and_the_watcher_leaves():
    before = list(sys.meta_path)
    auto_registration.install()
    assert sys.meta_path == before


def test_what_cannot_be_registered_warns_and_breaks_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tfree_tokenizer.registration", None)
    with pytest.warns(
        RuntimeWarning, match=r"tfree_tokenizer cannot register.*tfree_tokenizer\.register\(\) shows where"
    ):
        auto_registration.install()


def test_a_half_loaded_module_postpones_the_registration(monkeypatch):
    module = sys.modules["tfree_tokenizer.auto_registration"]
    monkeypatch.setattr(module.__spec__, "_initializing", True, raising=False)
    before = list(sys.meta_path)
    try:
        auto_registration.install()
        assert len(sys.meta_path) == len(before) + 1
    finally:
        sys.meta_path[:] = before
