"""Uploads an adapter and its model card in one commit."""

import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import write_card
from .config import ScarConfig

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel


def save_with_card(model: "PeftModel", folder: Path, repo_id: str | None = None, *, tags: Sequence[str] = ()) -> None:
    """Save all adapters, and the model card of the SCAR adapter, the one called "default" if there are several.

    Args:
        model: a PEFT model with at least one SCAR adapter.
        folder: made if it does not exist.
        repo_id: where readers will load it from, for the card's code. None: the folder itself.
        tags: for the Hub, beside those of every SCAR adapter.

    Raises:
        ValueError: the model has no SCAR adapter.

    Example:
        >>> save_with_card(model, Path("out"), "user/llama-toxicity-scar")
    """
    configs = _scar_configs(model)
    if not configs:
        raise ValueError(f"model must have a SCAR adapter, got adapters {sorted(model.peft_config)} of other types.")
    model.save_pretrained(str(folder))
    name = "default" if "default" in configs else next(iter(configs))
    has_own_code = bool(getattr(model.get_base_model().config, "auto_map", None))
    subfolder = None if name == "default" else name
    write_card(configs[name], folder, repo_id, tags=tags, subfolder=subfolder, trust_remote_code=has_own_code)


def push_to_hub(
    model: "PeftModel",
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload SCAR adapter",
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] = (),
) -> "CommitInfo":
    """Upload the adapters of a model to the Hub, with a card whose first block of code runs.

    `model.push_to_hub(repo_id)` does the same once this package is registered.

    Args:
        model: a PEFT model with at least one SCAR adapter.
        repo_id: "user/name"; made if it does not exist.
        private: whether a new repository is hidden from others.
        token: of the Hub. None: the one that is logged in.
        revision: branch to upload to; made if it does not exist.
        commit_message: first line of the commit.
        commit_description: what follows.
        create_pr: propose the commit instead of making it.
        tags: for the Hub, beside those of every SCAR adapter.

    Returns:
        The commit.

    Raises:
        ValueError: the model has no SCAR adapter.

    Example:
        >>> push_to_hub(model, "user/llama-toxicity-scar")
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        save_with_card(model, Path(name), repo_id, tags=tags)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=name,
            revision=revision,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
        )


def register_push() -> None:
    """Make `model.push_to_hub` of PEFT models with a SCAR adapter write this package's card.

    The method that they inherit saves first and then overwrites the card with a blank one, out of an adapter's reach.
    Models without a SCAR adapter keep that method. Calling this again changes nothing.
    """
    from peft import PeftModel

    inherited: Callable[..., Any] = PeftModel.push_to_hub
    if getattr(inherited, "writes_scar_card", False):
        return

    @wraps(inherited)
    def push(model: "PeftModel", repo_id: str, **kwargs: Any) -> Any:
        if not _scar_configs(model):
            return inherited(model, repo_id, **kwargs)
        kwargs.pop("max_shard_size", None)  # of models
        return push_to_hub(model, repo_id, **{name: value for name, value in kwargs.items() if value is not None})

    push.writes_scar_card = True  # type: ignore[attr-defined]
    PeftModel.push_to_hub = push


def _scar_configs(model: "PeftModel") -> dict[str, ScarConfig]:
    return {name: config for name, config in model.peft_config.items() if isinstance(config, ScarConfig)}
