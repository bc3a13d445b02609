"""When other libraries learn about AtMan: as soon as they are loaded, in whatever order, and never by our doing."""

import sys
from pathlib import Path

import pytest

from atman_explain import auto_registration, registration
from tests.support.processes import run_python


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package `a_library` whose part `a_library.part` is waited for; `actions` are the registrations so far."""
    (tmp_path / "a_library").mkdir()
    for name in ("__init__", "part", "other"):
        (tmp_path / "a_library" / f"{name}.py").write_text("")
    actions = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(auto_registration, "ACTIONS", {"a_library.part": "register_part"})
    monkeypatch.setattr(
        registration, "register_part", lambda: actions.append("a_library.part" in sys.modules), raising=False
    )
    before = list(sys.meta_path)
    yield tmp_path, actions
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.startswith("a_library")]:
        del sys.modules[name]


def write(path: Path, name: str, code: str) -> None:
    (path / "a_library" / f"{name}.py").write_text(code)


def test_a_library_loaded_later_is_told_at_once_and_the_watcher_leaves(library):
    _, actions = library
    before = list(sys.meta_path)
    auto_registration.install()
    import a_library

    assert actions == []
    import a_library.part  # noqa: F401

    assert actions == [True]
    assert sys.meta_path == before


def test_a_library_in_use_already_is_told_at_once(library):
    _, actions = library
    import a_library.part  # noqa: F401

    before = list(sys.meta_path)
    auto_registration.install()
    assert actions == [True]
    assert sys.meta_path == before


def test_nothing_is_done_before_the_outermost_import_ends(library):
    path, actions = library
    seen = []
    sys.modules["a_library_log"] = seen
    write(path, "other", "import sys, a_library.part\nsys.modules['a_library_log'].append('other goes on')")
    auto_registration.install()
    import a_library.other  # noqa: F401

    assert seen == ["other goes on"]
    assert actions == [True]


def test_being_imported_by_a_half_loaded_library_waits_for_its_end(library):
    path, actions = library
    write(
        path, "part", "from atman_explain import auto_registration\nauto_registration.install()\nimport a_library.other"
    )
    import a_library.part

    assert actions == []
    write(path, "third", "")
    import a_library.third  # noqa: F401

    assert actions == [True]


def test_what_cannot_be_registered_warns_and_breaks_nothing(library, monkeypatch):
    def fail() -> None:
        raise ImportError("too old")

    monkeypatch.setattr(registration, "register_part", fail)
    auto_registration.install()
    with pytest.warns(
        RuntimeWarning,
        match=r"atman_explain cannot register with a_library: too old. atman_explain.register\(\) shows where",
    ):
        import a_library.part  # noqa: F401


KNOWN = """
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pipelines import PIPELINE_REGISTRY
assert "explain" in PIPELINE_REGISTRY.supported_tasks
assert "atman" in AttentionInterface()
assert "atman" in AttentionMaskInterface()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "import atman_explain; from transformers import pipeline",
        "from transformers import pipeline; import atman_explain",
        "from atman_explain import AtMan; from transformers import pipeline",
        "import atman_explain; atman_explain.register(); atman_explain.register()",
    ],
)
def test_transformers_knows_atman_in_whatever_order_things_are_imported(order):
    run_python(order + KNOWN)
