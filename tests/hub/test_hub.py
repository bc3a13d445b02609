"""The loopback Hub against the real clients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.hub.server import LoopbackHub

LARGE = bytes(range(256)) * 40


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def filled(api: HfApi, repo_id: str) -> str:
    """A repository with one small file, one large file and one in a folder."""
    api.create_repo(repo_id)
    api.upload_file(repo_id=repo_id, path_in_repo="note.txt", path_or_fileobj=b"first")
    api.upload_file(repo_id=repo_id, path_in_repo="data.bin", path_or_fileobj=LARGE)
    api.upload_file(repo_id=repo_id, path_in_repo="folder/inner.txt", path_or_fileobj=b"inner")
    return repo_id


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).eval()


def hf(*arguments: str) -> str:
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_revision_pins_the_weights(repo_id):
    ids = torch.arange(6)[None]
    old, new = tiny_llama(1), tiny_llama(2)
    first = old.push_to_hub(repo_id)
    new.push_to_hub(repo_id)

    pinned = AutoModelForCausalLM.from_pretrained(repo_id, revision=first.oid)
    latest = AutoModelForCausalLM.from_pretrained(repo_id)

    assert torch.equal(pinned(ids).logits, old(ids).logits)
    assert torch.equal(latest(ids).logits, new(ids).logits)


def test_small_and_large_files_come_back_unchanged(filled, tmp_path):
    folder = Path(snapshot_download(filled, cache_dir=tmp_path))
    assert (folder / "note.txt").read_bytes() == b"first"
    assert (folder / "data.bin").read_bytes() == LARGE
    assert (folder / "folder/inner.txt").read_bytes() == b"inner"


def test_only_the_large_file_travels_through_lfs(filled, api):
    found = {entry.path: entry for entry in api.list_repo_tree(filled, recursive=True)}
    assert found["data.bin"].lfs.size == len(LARGE)
    assert found["note.txt"].lfs is None
    assert set(found) == {"note.txt", "data.bin", "folder", "folder/inner.txt"}


def test_a_folder_lists_only_its_own_entries(filled, api):
    assert {entry.path for entry in api.list_repo_tree(filled)} == {"note.txt", "data.bin", "folder"}
    assert [entry.path for entry in api.list_repo_tree(filled, "folder")] == ["folder/inner.txt"]


def test_branches_and_tags_keep_their_commit(filled, api, tmp_path):
    api.create_tag(filled, tag="v1.0")
    api.create_branch(filled, branch="next")
    api.upload_file(repo_id=filled, path_in_repo="note.txt", path_or_fileobj=b"second", revision="next")

    notes = {r: Path(hf_hub_download(filled, "note.txt", revision=r)).read_text() for r in ("main", "v1.0", "next")}
    assert notes == {"main": "first", "v1.0": "first", "next": "second"}
    refs = api.list_repo_refs(filled)
    assert [tag.name for tag in refs.tags] == ["v1.0"]
    assert {branch.name for branch in refs.branches} == {"main", "next"}


def test_history_lists_the_newest_commit_first(filled, api):
    commits = api.list_repo_commits(filled)
    assert len(commits) == 4
    assert commits[0].commit_id == api.repo_info(filled).sha
    assert commits[-1].title == "initial commit"


def test_deleted_files_are_gone_but_stay_in_older_revisions(filled, api):
    before = api.repo_info(filled).sha
    api.delete_folder("folder", filled)
    api.delete_file("note.txt", filled)
    assert api.list_repo_files(filled) == ["data.bin"]
    assert "note.txt" in api.list_repo_files(filled, revision=before)


def test_missing_things_raise_the_error_that_names_them(filled, repo_id):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/absent", "note.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(filled, "note.txt", revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(filled, "absent.txt")


def test_a_wrong_token_cannot_write(filled):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").upload_file(repo_id=filled, path_in_repo="note.txt", path_or_fileobj=b"x")


def test_creating_twice_needs_exist_ok(filled, api):
    assert api.create_repo(filled, exist_ok=True).repo_id == filled
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(filled)


def test_a_deleted_repository_can_be_created_again(filled, api):
    api.delete_repo(filled)
    assert not api.repo_exists(filled)
    api.create_repo(filled)
    assert api.list_repo_files(filled) == []


def test_datasets_and_kernels_live_beside_models_of_the_same_name(filled, api):
    for kind in ("dataset", "kernel"):
        api.create_repo(filled, repo_type=kind)
        api.upload_file(repo_id=filled, repo_type=kind, path_in_repo="data.bin", path_or_fileobj=kind.encode() * 9)
        path = hf_hub_download(filled, "data.bin", repo_type=kind)
        assert Path(path).read_bytes() == kind.encode() * 9
    assert Path(hf_hub_download(filled, "data.bin")).read_bytes() == LARGE


def test_a_model_card_is_validated_and_comes_back(filled, hub: LoopbackHub):
    card = ModelCard("---\nlicense: apache-2.0\ntags: [test]\n---\n\n# A card\n")
    card.push_to_hub(filled)
    assert ModelCard.load(filled).data.tags == ["test"]
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_part_of_a_file_can_be_asked_for(filled, hub: LoopbackHub):
    answer = hub.answer("GET", f"/{filled}/resolve/main/data.bin", {"Range": "bytes=5-9"}, b"")
    assert (answer.status, answer.body) == (206, bytes([5, 6, 7, 8, 9]))
    assert answer.headers["Content-Range"] == f"bytes 5-9/{len(LARGE)}"


def test_the_command_line_client_uploads_downloads_and_knows_the_user(filled, tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up/more.txt").write_text("more")
    hf("upload", filled, str(tmp_path / "up"), "subfolder")
    hf("download", filled, "--local-dir", str(tmp_path / "down"))
    assert (tmp_path / "down/subfolder/more.txt").read_text() == "more"
    assert (tmp_path / "down/data.bin").read_bytes() == LARGE
    assert "user" in hf("auth", "whoami")
