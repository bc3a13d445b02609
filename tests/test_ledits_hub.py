"""LEDITS++ through the Hub: a pushed pipeline is one commit with code and a card, and edits without this package."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download

from ledits_pipeline import LEditsPipeline, LEditsPipelineSD
from tests.support import ledits
from tests.support.processes import PACKAGES, run_python
from tests.support.snippets import run_page
from tools.bundle import bundle

REPOSITORY = "user/edits-itself"
STRANGER = """
import json, sys, torch
from diffusers import DiffusionPipeline
from PIL import Image

repository, folder = sys.argv[1:]
answers = {}
try:
    DiffusionPipeline.from_pretrained(repository)
except ValueError as error:
    answers["untrusted"] = "trust_remote_code" in str(error)
ways = {
    "hub": (repository, {"revision": "v1"}),
    "folder": (folder, {}),
    "custom pipeline": (folder, {"custom_pipeline": folder}),
}
for name, (place, options) in ways.items():
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    made = pipe.invert(Image.open("picture.png"), num_inversion_steps=3, generator=torch.Generator().manual_seed(0))
    made.save_pretrained("inversion")
    again = type(made).from_pretrained("inversion")
    out = pipe(editing_prompt="cat", inversion=again, use_intersect_mask=True, output_type="latent")
    answers[name] = out.images.tolist()
answers["ours"] = sorted({"ledits_pipeline", "shared_kernels"} & set(sys.modules))
pipe.save_pretrained("again")
print(json.dumps(answers))
"""


def editor(kind: type[LEditsPipeline] = LEditsPipeline) -> LEditsPipeline:
    pipe = kind(**ledits.sd_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pushed() -> LEditsPipeline:
    pipe = editor(LEditsPipelineSD)
    pipe.push_to_hub(REPOSITORY, license="mit")
    HfApi().create_tag(REPOSITORY, tag="v1")
    return pipe


@pytest.fixture(scope="module")
def visit(pushed, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("stranger")
    pushed.save_pretrained(folder / "saved", push_code=True)
    ledits.picture().save(folder / "picture.png")
    printed = run_python(STRANGER, REPOSITORY, str(folder / "saved"), hidden=PACKAGES, cwd=folder)
    return json.loads(printed.splitlines()[-1]), folder


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hub", "folder", "custom pipeline"])
def test_a_stranger_without_our_package_edits_as_we_do(visit, pushed, place):
    answers, _ = visit
    assert answers["untrusted"]
    assert answers["ours"] == []
    pushed.invert(ledits.picture(), num_inversion_steps=3, generator=ledits.seeded())
    wanted = pushed(editing_prompt="cat", use_intersect_mask=True, output_type="latent").images
    torch.testing.assert_close(torch.tensor(answers[place]), wanted, atol=1e-3, rtol=1e-3)  # the mode's drift


@pytest.mark.slow
def test_what_a_stranger_saves_has_the_same_code_and_weights(visit):
    snapshot, again = Path(snapshot_download(REPOSITORY, revision="v1")), visit[1] / "again"
    names = ["pipeline.py", "unet/diffusion_pytorch_model.safetensors"]
    assert all((again / name).read_bytes() == (snapshot / name).read_bytes() for name in names)
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == ["pipeline", "LEditsPipeline"]


def test_a_folder_with_code_loads_as_the_class_in_it(tmp_path):
    editor().save_pretrained(tmp_path, push_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)
    found = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(found).__module__.startswith("diffusers_modules.")
    assert type(found.adapter).__module__ == type(found).__module__


def test_a_repository_holds_only_code_json_safetensors_and_text(pushed):
    suffixes = {Path(name).suffix for name in HfApi().list_repo_files(REPOSITORY)}
    assert suffixes - {""} <= {".json", ".md", ".py", ".safetensors", ".txt"}


def test_everything_arrives_in_one_commit(pushed):
    assert [commit.title for commit in HfApi().list_repo_commits(REPOSITORY)][:1] == ["Upload LEDITS++ pipeline"]
    assert len(HfApi().list_repo_commits(REPOSITORY)) <= 2  # the Hub makes one when it creates a repository


def test_the_cards_code_runs(pushed, tmp_path):
    page = Path(hf_hub_download(REPOSITORY, "README.md"))
    data = ModelCard.load(page).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "image-to-image", "mit")
    assert "custom_code" in data.tags
    small = page.read_text(encoding="utf-8").replace('gradient("L")', 'gradient("L").resize((32, 32))')
    (tmp_path / "card.md").write_text(small, encoding="utf-8")
    assert run_page(tmp_path / "card.md", tmp_path) == 1
    assert (tmp_path / "edited.png").is_file()


def test_a_card_that_somebody_wrote_stays():
    name = "user/has-a-card"
    HfApi().create_repo(name)
    ModelCard("---\nlicense: mit\n---\n# Mine\n").push_to_hub(name)
    editor().push_to_hub(name)
    assert Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8").endswith("# Mine\n")


def test_without_code_a_pipeline_is_saved_under_its_own_name(tmp_path):
    editor(LEditsPipelineSD).save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline.py").exists()
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "LEditsPipelineSD"
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is LEditsPipelineSD


def test_saving_can_upload(tmp_path):
    editor().save_pretrained(tmp_path / "saved-and-pushed", push_to_hub=True, repo_id="user/saved-and-pushed")
    assert {"README.md", "pipeline.py", "model_index.json"} <= set(HfApi().list_repo_files("user/saved-and-pushed"))


def test_a_bundle_orders_modules_by_need_and_merges_their_imports(tmp_path):
    (tmp_path / "entry.py").write_text('"""Entry."""\n\nimport math\n\nfrom .low import two\n\nfour = two() * 2\n')
    (tmp_path / "low.py").write_text(
        '"""Low."""\n\nimport math\n\n\ndef two():\n    from .late import one\n\n    return one() + math.cos(0.0)\n'
    )
    (tmp_path / "late.py").write_text("from math import floor\n\n\ndef one():\n    return floor(1.5)\n")
    text = bundle(tmp_path / "entry.py")
    names: dict[str, Any] = {}
    exec(compile(text, "bundle", "exec"), names)
    assert (names["four"], names["__doc__"]) == (4.0, "Entry.")
    assert text.count("import math") == 1
    assert "from ." not in text


def test_a_bundle_refuses_names_that_would_hide_each_other(tmp_path):
    (tmp_path / "entry.py").write_text("from .low import two\n\nsize = two\n")
    (tmp_path / "low.py").write_text("two = 2\nsize = 3\n")
    with pytest.raises(ValueError, match=r"entry.py and low.py both define size; one file needs distinct names."):
        bundle(tmp_path / "entry.py")
    (tmp_path / "low.py").write_text("from math import cos\n\ntwo = cos\n")
    (tmp_path / "entry.py").write_text("from .low import two\n\ncos = two\n")
    with pytest.raises(ValueError, match=r"the modules define \['cos'\], which others of them import."):
        bundle(tmp_path / "entry.py")
    (tmp_path / "entry.py").write_text("from .low import two as zwei\n\ndrei = zwei\n")
    with pytest.raises(ValueError, match="renames what it imports from low"):
        bundle(tmp_path / "entry.py")


def test_the_bundled_file_shows_diffusers_one_pipeline_class():
    path = Path(sys.modules["ledits_pipeline"].__file__).parent / "remote" / "pipeline_ledits.py"
    text = path.read_text(encoding="utf-8")
    assert text.count("(DiffusionPipeline):") == 1
    assert "from ." not in text
