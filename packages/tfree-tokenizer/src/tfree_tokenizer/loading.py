"""Loads tokenizer and model that belong together, after checking every file, so that an error names file and field."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open

from .json_files import read_json
from .remote.configuration_tfree import TFreeConfig
from .remote.modeling_tfree import TFreeForCausalLM
from .remote.tokenization_tfree import TFreeTokenizer
from .remote.wordlist_tfree import WORDS_FILE

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer_config.json"
_FILE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")
_SIZES = (
    "hash_vocab_size",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hashes",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_MAX_INDEX_BYTES = 1 << 27


def load_pretrained(
    repo_or_folder: str | os.PathLike[str], *, revision: str | None = None, **model_kwargs: Any
) -> tuple[TFreeTokenizer, TFreeForCausalLM]:
    """Load a tokenizer and its model from a folder or from the Hub, with this package's code only.

    Args:
        repo_or_folder: a folder that `save_pretrained` or a conversion wrote, or the name of a Hub repository.
        revision: commit, branch or tag of the repository.
        **model_kwargs: for `TFreeForCausalLM.from_pretrained`, such as `dtype` or `device_map`. `cache_dir`,
            `force_download`, `local_files_only`, `subfolder` and `token` also find the tokenizer.

    Returns:
        The tokenizer and the model, which reads exactly the tokenizer's ids.

    Raises:
        OSError: a file is missing; names it.
        ValueError: a file is truncated or damaged, does not fit the others, or an option would load anything but
            safetensors; names the file and the field or tensor.

    Example:
        >>> tokenizer, model = load_pretrained("miniatures/tfree/checkpoint", dtype="float32")
    """
    if model_kwargs.pop("use_safetensors", True) is not True:
        raise ValueError("use_safetensors must be True: other formats can run code when they are loaded.")
    files = _Files(repo_or_folder, revision, model_kwargs)
    config_path = files.find(CONFIG_FILE)
    tokenizer = load_tokenizer(repo_or_folder, revision=revision, **files.options)
    config = _read_config(config_path)
    with torch.device("meta"):
        expected = TFreeForCausalLM(config)
    try:
        expected.check_dictionary(tokenizer)
    except ValueError as error:
        raise ValueError(f"{config_path}: dictionary_fingerprint does not fit {WORDS_FILE}: {error}") from error
    _check_weights(files, expected, variant=model_kwargs.get("variant"))
    model = TFreeForCausalLM.from_pretrained(
        repo_or_folder, revision=files.revision, use_safetensors=True, **model_kwargs
    )
    model.check_dictionary(tokenizer)
    return tokenizer, model


def load_tokenizer(
    repo_or_folder: str | os.PathLike[str], *, revision: str | None = None, **options: Any
) -> TFreeTokenizer:
    """Load a tokenizer alone. Arguments and errors are those of `load_pretrained`."""
    files = _Files(repo_or_folder, revision, options)
    path = files.find(TOKENIZER_FILE)
    files.find(WORDS_FILE)
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(settings).__name__}.")
    try:
        return TFreeTokenizer.from_pretrained(repo_or_folder, revision=files.revision, **files.options)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: does not describe a T-FREE tokenizer: {error}") from error
    except ValueError as error:
        if WORDS_FILE in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def find_config(
    repo_or_folder: str | os.PathLike[str], *, revision: str | None = None, **options: Any
) -> TFreeConfig | None:
    """Read the configuration of the model beside a tokenizer; None if the place has no model."""
    path = _Files(repo_or_folder, revision, options).find_any(CONFIG_FILE)
    return None if path is None else _read_config(path)


class _Files:
    """The files of one checkpoint, in a folder or on the Hub."""

    def __init__(self, source: str | os.PathLike[str], revision: str | None, options: dict[str, Any]) -> None:
        self.source, self.revision = os.fspath(source), revision or "main"
        self.options = {name: options[name] for name in _FILE_OPTIONS if options.get(name) is not None}

    def find(self, name: str) -> Path:
        """Path of a file on this machine, downloaded if need be.

        Raises:
            FileNotFoundError: the folder or repository does not have it.
        """
        found = self.find_any(name)
        if found is None:
            raise FileNotFoundError(
                f"{self.source} has no {name}, so it is no complete T-FREE checkpoint. It needs {CONFIG_FILE}, "
                f"{TOKENIZER_FILE}, {WORDS_FILE} and model.safetensors: save model and tokenizer to the same place."
            )
        return found

    def find_any(self, *names: str) -> Path | None:
        """Path of the first of several files that exists."""
        if os.path.isdir(self.source):
            paths = [Path(self.source, self.options.get("subfolder", ""), name) for name in names]
            return next((path for path in paths if path.is_file()), None)
        unreachable = None
        for name in names:
            try:
                return Path(hf_hub_download(self.source, name, revision=self.revision, **self.options))
            except LocalEntryNotFoundError as error:  # offline, and not in the cache
                unreachable = error
            except EntryNotFoundError:
                continue
            except HFValidationError as error:
                raise FileNotFoundError(f"{self.source} is neither a folder nor the name of a repository.") from error
        if unreachable is not None:
            raise unreachable
        return None


def _read_config(path: Path) -> TFreeConfig:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") != "tfree":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: model_type must be 'tfree', got {kind!r}.")
    if values.get("dictionary_fingerprint") is None:
        raise ValueError(
            f"{path}: dictionary_fingerprint is missing: the model was saved before model.set_dictionary(tokenizer)."
        )
    for name in _SIZES:
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {name} must be a whole number of at least 1, got {value!r}.")
    try:
        return TFreeConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_weights(files: _Files, expected: TFreeForCausalLM, variant: str | None) -> None:
    """Compare the headers of all weight files with the model that the configuration describes, before any is loaded."""
    tensors = {name: (path, shape) for path in _weight_files(files, variant) for name, shape in _header(path)}
    if getattr(expected.config, "quantization_config", None) is not None:
        return  # quantized weights have names and shapes of their own
    for name, tensor in expected.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{files.source}: no weight file holds tensor {name}, which {CONFIG_FILE} calls for.")
        path, shape = tensors.pop(name)
        if shape != list(tensor.shape):
            raise ValueError(
                f"{path}: tensor {name} must have shape {list(tensor.shape)} by {CONFIG_FILE}, got {shape}."
            )
    for name, (path, _) in tensors.items():
        raise ValueError(f"{path}: tensor {name} has no place in the model that {CONFIG_FILE} describes.")


def _weight_files(files: _Files, variant: str | None) -> Iterator[Path]:
    middle = f".{variant}" if variant else ""
    path = files.find_any(f"model{middle}.safetensors", f"model.safetensors.index{middle}.json")
    if path is None:
        files.find(f"model{middle}.safetensors")
    elif path.suffix == ".safetensors":
        yield path
    else:
        index = read_json(path, _MAX_INDEX_BYTES)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{path}: weight_map must map tensors to files.")
        for name in dict.fromkeys(shards.values()):
            if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise ValueError(f"{path}: weight_map must name safetensors files in the same folder, got {name!r}.")
            yield files.find(name)


def _header(path: Path) -> list[tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is truncated or damaged: {error}") from error
