"""What an original SCAR or G-SAE checkpoint says about itself, checked and put into this package's words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("topk", "topk-sigmoid", "topk-tanh", "relu")
SITES = ("mlp", "block")
MAX_LAYER, MAX_HIDDEN_SIZE, MAX_LATENTS = 4095, 1 << 20, 1 << 24
PII_CONCEPTS = (
    *("time", "username", "email", "idcard", "socialnumber", "lastname", "passport", "driverlicense", "bod"),
    *("ip", "givenname", "city", "state", "title", "sex", "postcode", "building", "street", "tel", "date"),
    *("country", "pass", "secaddress", "geocoord", "cardissuer"),
)
"""Concepts of a personal-data checkpoint, in the order of its latents."""

_CONCEPTS_OF = {
    "rtp": ("toxicity",),
    "rtp_split": ("toxicity",),
    "sp": ("shakespeare",),
    "shakespeare": ("shakespeare",),
    "aegis": ("unsafe",),
    "pii": PII_CONCEPTS,
    "pii_300k": PII_CONCEPTS,
    "pii_300k_mult_lang": PII_CONCEPTS,
}
_LABELS_OF = {
    "toxicity": "RealToxicityPrompts, toxicity >= 0.5",
    "shakespeare": "parallel lines of Shakespeare's plays, original against modern English",
    "unsafe": "Aegis-AI-Content-Safety-Dataset-1.0, majority of the annotators",
    "time": "ai4privacy/pii-masking-300k, character spans",
}
_DATA_PATH = re.compile(r"[^-/]*-(?P<data>\w+)-B(?P<layer>\d+)(?:-(?P<site>\w+))?/?$")
_FILE_NAME = re.compile(r"-b(?P<layer>\d+)-k\d+")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """One sparse coder: where it reads, its sizes, its activation and what its first latents stand for."""

    layer: int
    site: str
    hidden_size: int
    n_latents: int
    k: int | None
    """Latents kept per token; None for an activation that keeps all."""

    activation: str
    concepts: tuple[str, ...]
    base_model: str | None
    label_source: str | None


def read_settings(
    values: Mapping[str, Any],
    where: str = "config.json",
    *,
    layer: int | None = None,
    site: str | None = None,
    concepts: Sequence[str] | None = None,
) -> CheckpointSettings:
    """Read the `config.json` of a published model, or the JSON file that the original's trainer was started with.

    `normalize`, `tied` and `mod_*` are left aside: whatever they say, the published classes normalize, do not tie, and
    steering is set later.

    Args:
        values: the parsed file.
        where: its name, for messages; in the trainer's files the name also tells the layer ("...-b11-k2048.json").
        layer: stands in for, or overrules, the file's.
        site: likewise.
        concepts: names of the first latents. None: those of the data set that the file names, else "toxicity".

    Raises:
        ValueError: a value is missing or out of range; names file and key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: must hold a JSON object, got {type(values).__name__}.")
    data = _DATA_PATH.match(str(values.get("ds_path") or "").rstrip("/").rpartition("/")[2])
    hidden_size = _whole(values.get("n_inputs"), f"{where}: n_inputs", 1, MAX_HIDDEN_SIZE)
    n_latents = _n_latents(values, where, hidden_size)
    activation = _activation(values, where)
    named = _concepts(concepts, data["data"].lower() if data else None, n_latents)
    return CheckpointSettings(
        layer=_layer(values, where, layer, data),
        site=_site(values, where, site, data),
        hidden_size=hidden_size,
        n_latents=n_latents,
        k=_k(values, where, n_latents) if activation.startswith("topk") else None,
        activation=activation,
        concepts=named,
        base_model=_base_model(values, where),
        label_source=None if concepts is not None else _LABELS_OF.get(named[0]),
    )


def _whole(value: Any, name: str, least: int, largest: int, meaning: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
        raise ValueError(f"{name} must be a whole number in [{least}, {largest}]{meaning}, got {value!r}.")
    return value


def _n_latents(values: Mapping[str, Any], where: str, hidden_size: int) -> int:
    if values.get("n_latents") is not None or values.get("factor") is None:
        return _whole(values.get("n_latents"), f"{where}: n_latents", 1, MAX_LATENTS)
    return hidden_size * _whole(values["factor"], f"{where}: factor", 1, MAX_LATENTS // hidden_size)


def _k(values: Mapping[str, Any], where: str, n_latents: int) -> int:
    key = "k" if values.get("activation_k") is None and "k" in values else "activation_k"
    return _whole(values.get(key), f"{where}: {key}", 1, n_latents, " (the number of latents)")


def _activation(values: Mapping[str, Any], where: str) -> str:
    activation = values.get("activation")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}.")
    return str(activation)


def _layer(values: Mapping[str, Any], where: str, layer: int | None, data: re.Match[str] | None) -> int:
    if layer is not None:
        return _whole(layer, "layers", 0, MAX_LAYER)
    if values.get("hook_block_num") is not None:
        return _whole(values["hook_block_num"], f"{where}: hook_block_num", 0, MAX_LAYER)
    found = data or _FILE_NAME.search(where)
    if not found:
        raise ValueError(f"{where}: hook_block_num is missing; pass layers=[...] with the block that was coded.")
    return int(found["layer"])


def _site(values: Mapping[str, Any], where: str, site: str | None, data: re.Match[str] | None) -> str:
    stated = site or values.get("site") or (data["site"] if data else None)
    if stated is None and values.get("hook_block_num") is not None:
        stated = "mlp"  # what the published configuration class fills in
    if stated is None:
        raise ValueError(f'{where}: site is missing; pass site="mlp" or site="block".')
    if stated not in SITES:
        raise ValueError(f"{where}: site must be one of {list(SITES)}, got {stated!r}.")
    return str(stated)


def _concepts(concepts: Sequence[str] | None, data: str | None, n_latents: int) -> tuple[str, ...]:
    if isinstance(concepts, str):
        raise ValueError(f"concepts must be a list of names, got the text {concepts!r}; write [{concepts!r}].")
    named = tuple(concepts) if concepts is not None else _CONCEPTS_OF.get(data or "rtp")
    if named is None:
        raise ValueError(
            f"concepts of the data set {data!r} are not known; pass concepts=[...], the first latent first."
        )
    if not 1 <= len(named) <= n_latents:
        raise ValueError(f"concepts must hold 1 to {n_latents} names (the number of latents), got {len(named)}.")
    return named


def _base_model(values: Mapping[str, Any], where: str) -> str | None:
    name = values.get("base_model_name") or None
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where}: base_model_name must be the name of a model, got {name!r}.")
    return name
