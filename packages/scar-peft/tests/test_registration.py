"""How peft learns about the method "SCAR", in whatever order things are imported, and only once."""

import copy
import importlib
import json
import pickle
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import scar_peft
from scar_peft import ScarConfig, ScarModel, auto_registration, register
from scar_peft.peft_type import SCAR
from tests.support import scar_models as tiny
from tests.support.processes import run_python

REGISTRIES = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
KNOWN = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["SCAR"].__name__ == "ScarConfig"
"""


def test_the_registries_hold_the_method():
    assert [registry["SCAR"] for registry in REGISTRIES] == [ScarConfig, ScarModel, "scar_"]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[SCAR] == f"{SCAR.value.lower()}_"  # as transformers derives it


@pytest.mark.parametrize(
    "order",
    [
        "import scar_peft; import peft",
        pytest.param("import peft; import scar_peft", marks=pytest.mark.slow),
        pytest.param("import scar_peft; from peft import PeftModel", marks=pytest.mark.slow),
        pytest.param("from scar_peft import ScarConfig", marks=pytest.mark.slow),
        pytest.param("import scar_peft; scar_peft.register(); scar_peft.register()", marks=pytest.mark.slow),
        pytest.param("import scar_peft, importlib; importlib.reload(scar_peft); import peft", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_it_in_whatever_order_things_are_imported(order):
    run_python(order + KNOWN)


def test_importing_the_package_is_cheap():
    run_python("import sys, scar_peft; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)")


def test_registering_again_and_reloading_change_nothing():
    before = [dict(registry) for registry in REGISTRIES]
    watchers = list(sys.meta_path)
    register()
    auto_registration.install()
    importlib.reload(scar_peft)
    assert [dict(registry) for registry in REGISTRIES] == before
    assert sys.meta_path == watchers


def test_another_package_of_the_name_is_not_overwritten(monkeypatch):
    class Other(PeftConfig):
        pass

    Other.__module__ = "other.config"
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "SCAR", Other)
    with pytest.raises(
        RuntimeError, match=r'peft knows a method "SCAR" of other\.config already; uninstall one of the two'
    ):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SCAR"] is Other


def test_what_cannot_be_registered_warns_and_breaks_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scar_peft.registration", None)
    with pytest.warns(
        RuntimeWarning, match=r"scar_peft cannot register with peft.*scar_peft\.register\(\) shows where"
    ):
        auto_registration.install()


def test_the_name_of_the_type_passes_for_a_member_of_peft_type():
    assert SCAR == "SCAR"
    assert hash(SCAR) == hash("SCAR")
    assert (SCAR.value, SCAR.name) == ("SCAR", "SCAR")
    assert str(SCAR) == f"{SCAR}" == "PeftType.SCAR"
    assert str(SCAR) == str(PeftType.LORA).replace("LORA", "SCAR")
    assert json.loads(json.dumps({"peft_type": SCAR})) == {"peft_type": "SCAR"}
    for twin in (copy.deepcopy(SCAR), pickle.loads(pickle.dumps(SCAR))):
        assert twin == SCAR
        assert twin.value == "SCAR"


def test_configurations_are_copied_and_pickled():
    config = tiny.settings()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.peft_type.value == "SCAR"
