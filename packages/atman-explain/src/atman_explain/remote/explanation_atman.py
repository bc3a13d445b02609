"""`Explanation`: how much every unit of a prompt supports every target token, and what can be asked of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .units_atman import Unit


@dataclass(frozen=True, kw_only=True)
class Target:
    """One explained output: a token of the continuation, a class, or several of them in sum."""

    text: str
    """As shown to people."""

    id: int | None = None
    """Token id or class index. None: the sum of several."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """What AtMan found out about one prompt.

    A score is the log-probability that a target loses when attention to a unit is suppressed: positive supports the
    target, negative speaks against it, 0 means no effect.

    Raises:
        ValueError: the fields disagree in length; the message names the field.
    """

    scores: Tensor
    """[targets, units], float32 (float64 for float64 models), in nats unless `score_unit` says otherwise. NaN: not
    computed, because the run was interrupted."""

    units: tuple[Unit, ...]
    """What was suppressed, one column of `scores` each."""

    targets: tuple[Target, ...]
    """What was explained, one row of `scores` each."""

    baseline_logprobs: Tensor
    """[targets], log-probability of every target without suppression, in nats; its logit if `delta="logit"`."""

    prompt: str | None = None
    """The text; None if only ids were given, or no text at all."""

    prompt_ids: tuple[int, ...] = ()
    """[P], without padding; empty for pure image models."""

    tokens: tuple[str, ...] = ()
    """[P], display text of `prompt_ids`."""

    config: dict[str, Any] = field(default_factory=dict)
    """The `AtManConfig` of the run as plain JSON values; `squared()` and the like keep it up to date."""

    is_coarse: tuple[bool, ...] | None = None
    """Units whose score is that of the larger unit they lie in (`granularity="auto"`). None: no unit."""

    grids: tuple[tuple[int, int], ...] = ()
    """Patch rows and columns of every image."""

    special: tuple[bool, ...] = ()
    """[P], which tokens are special, such as the beginning of the text. Empty: unknown."""

    def __post_init__(self) -> None:
        shape = (len(self.targets), len(self.units))
        if 0 in shape:
            raise ValueError(f"targets and units must not be empty, got {shape[0]} targets and {shape[1]} units.")
        if tuple(self.scores.shape) != shape:
            raise ValueError(f"scores must be [targets, units] = {list(shape)}, got {list(self.scores.shape)}.")
        if tuple(self.baseline_logprobs.shape) != shape[:1]:
            raise ValueError(
                f"baseline_logprobs must be [targets] = [{shape[0]}], got {list(self.baseline_logprobs.shape)}."
            )
        P = len(self.prompt_ids)
        if len(self.tokens) != P:
            raise ValueError(f"tokens must have one entry per prompt id ({P}), got {len(self.tokens)}.")
        if self.special and len(self.special) != P:
            raise ValueError(f"special must have one entry per prompt id ({P}) or none, got {len(self.special)}.")
        if self.is_coarse is not None and len(self.is_coarse) != shape[1]:
            raise ValueError(f"is_coarse must have one entry per unit ({shape[1]}), got {len(self.is_coarse)}.")

    @property
    def score_unit(self) -> str:
        """The unit that scores are in: "nats" unless post-processing changed it."""
        if self.config.get("normalize"):
            return "normalized"
        unit = "logits" if self.config.get("delta") == "logit" else "nats"
        return {"absolute": f"|{unit}|", "square": f"{unit}²"}.get(self.config.get("postprocess", "none"), unit)

    def relevance(self, target: int | None = None) -> Tensor:
        """Give the scores [units] of one target; None sums over all targets.

        Raises:
            ValueError: there is no such target.
        """
        if target is None:
            return self.scores.sum(0)
        if not -len(self.targets) <= target < len(self.targets):
            raise ValueError(f"target must lie in [0, {len(self.targets)}) (one per target token), got {target}.")
        return self.scores[target]

    def top(self, k: int = 3, target: int | None = None) -> list[tuple[Unit, float]]:
        """List the units that support the output most, with their scores.

        Args:
            k: how many; fewer if fewer have a score.
            target: index of the target; None sums over all targets.

        Example:
            >>> [(unit.text, round(score, 2)) for unit, score in explanation.top(2)]
            [('Oslo', 3.21), (' capital', 1.1)]
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        scores = self.relevance(target).tolist()
        known = [index for index, score in enumerate(scores) if score == score]  # NaN was not computed
        best = sorted(known, key=lambda index: -scores[index])[:k]  # stable: ties keep the order of the prompt
        return [(self.units[index], scores[index]) for index in best]

    def total(self) -> "Explanation":
        """Sum over targets: one row for the whole output."""
        text = "".join(target.text for target in self.targets)
        return replace(
            self,
            scores=self.scores.sum(0, keepdim=True),
            targets=(Target(text=text, id=self.targets[0].id if len(self.targets) == 1 else None),),
            baseline_logprobs=self.baseline_logprobs.sum(0, keepdim=True),
            config=self.config | {"target_granularity": "complete"},
        )

    def absolute(self) -> "Explanation":
        """Drop the signs: how much a unit matters, whether for or against."""
        return replace(self, scores=self.scores.abs(), config=self.config | {"postprocess": "absolute"})

    def squared(self) -> "Explanation":
        """Square the scores, as the original code does; strong units stand out, signs are lost."""
        return replace(self, scores=self.scores.square(), config=self.config | {"postprocess": "square"})

    def normalized(self) -> "Explanation":
        """Map the scores of every target to [0, 1]: least to 0, greatest to 1; equal scores all become 0."""
        is_known = self.scores.isfinite()
        low = self.scores.masked_fill(~is_known, torch.inf).amin(1, keepdim=True)
        high = self.scores.masked_fill(~is_known, -torch.inf).amax(1, keepdim=True)
        width = high - low
        scores = (self.scores - low) / width.where(width > 0, 1.0)
        return replace(self, scores=scores.where(is_known, self.scores), config=self.config | {"normalize": True})

    def aggregate(self, groups: Literal["word", "sentence", "paragraph"] | Sequence[Sequence[int]]) -> "Explanation":
        """Sum scores over larger units.

        This adds up what was measured one by one. Suppressing a whole sentence at once, `granularity="sentence"`, is
        another and cheaper experiment, with another result: tokens stand in for each other.

        Args:
            groups: text units are summed by word, sentence or paragraph, and the others stay as they are; or lists of
                unit indices, which become the units.

        Raises:
            ValueError: the prompt's text or a unit's place in it is unknown, or a group is empty, out of range,
                repeats a unit or mixes kinds.
        """
        from .grouping_atman import group_by_text, join_units

        lists = group_by_text(self, groups) if isinstance(groups, str) else [list(group) for group in groups]
        units = join_units(self, lists)
        coarse = self.is_coarse
        return replace(
            self,
            scores=torch.stack([self.scores[:, members].sum(1) for members in lists], 1),
            units=units,
            is_coarse=None if coarse is None else tuple(any(coarse[u] for u in members) for members in lists),
        )

    def image_map(self, i: int = 0, target: int | None = None) -> Tensor:
        """Lay the scores of an image's units out as the image: [patch rows, patch columns].

        Every patch of a tile has the tile's score; patches without a unit are NaN.

        Args:
            i: index of the image.
            target: index of the target; None sums over all targets.

        Raises:
            ValueError: there is no such image, or it has no units.
        """
        if not 0 <= i < len(self.grids):
            raise ValueError(f"i must be the index of one of the {len(self.grids)} images of the prompt, got {i}.")
        scores = self.relevance(target)
        result = scores.new_full(self.grids[i], torch.nan)
        boxes = [(u, unit.box) for u, unit in enumerate(self.units) if unit.image == i and unit.box is not None]
        if not boxes:
            raise ValueError(f'image {i} has no units; explain with units="all" or units="image".')
        for u, (row, column, height, width) in boxes:
            result[row : row + height, column : column + width] = scores[u]
        return result

    def overlay(self, image: Any, i: int = 0, target: int | None = None, alpha: float = 0.6) -> Any:
        """Paint the relevance of an image's regions over it; regions that speak against the target stay bare.

        Args:
            image: the picture the model saw: a PIL image, or an array [H, W, 3] of bytes. The patch grid is taken to
                cover all of it.
            i: index of the image in the prompt.
            target: index of the target; None sums over all targets.
            alpha: opacity of the strongest region, in [0, 1].

        Returns:
            A PIL image of the same size, RGB.
        """
        from .overlay_atman import overlay_map

        return overlay_map(self.image_map(i, target), image, alpha=alpha)

    def plot(self, target: int | None = None) -> Any:
        """Draw the prompt as a heat map, one panel per target token, and the map of every image.

        Args:
            target: index of the only target to draw; None draws the first few.

        Returns:
            A matplotlib Figure. It belongs to no window: notebooks show it, `figure.savefig(path)` writes it.
        """
        from .heatmap_atman import plot_tokens

        return plot_tokens(self, target)

    def _repr_html_(self) -> str:
        from .html_atman import render_html

        return render_html(self)

    def __str__(self) -> str:
        from .terminal_atman import render_text

        return render_text(self)

    def __repr__(self) -> str:
        target = "".join(target.text for target in self.targets)
        return f"Explanation(units={len(self.units)}, targets={len(self.targets)}, target={target[:60]!r})"

    def to_ansi(self, target: int | None = None) -> str:
        """Give the prompt with coloured backgrounds for a terminal of 256 colours; without colours if NO_COLOR is set.

        Args:
            target: index of the target; None sums over all targets.
        """
        from .terminal_atman import render_ansi

        return render_ansi(self, target)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; scores that were not computed become None.

        Raises:
            ValueError: a score or log-probability is infinite, or the configuration is no JSON.
        """
        from .records_atman import explanation_to_dict

        return explanation_to_dict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Explanation":
        """Build an explanation from `to_dict`'s result, trusting nothing in it.

        Raises:
            ValueError: an entry is missing, unknown, of the wrong type, out of range or too large; the message names
                the entry.
        """
        from .records_atman import explanation_from_dict

        return explanation_from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step: after a failure the previous file is still there, whole."""
        from .json_atman import write_json

        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanation":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is missing, too large, damaged or holds anything else; the message names it.
        """
        from .json_atman import read_json
        from .records_atman import explanation_from_dict

        values = read_json(path)
        try:
            return explanation_from_dict(values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def to_inseq(self) -> Any:
        """Convert to inseq's result for decoder-only models, for its aggregation and displays.

        Returns:
            `inseq.data.CoarseFeatureAttributionSequenceOutput` with `target_attributions` [P + M, M]: one row per
            prompt and target token, one column per target token, NaN from the diagonal on. Tokens of a larger unit
            carry its score each; tokens without one carry 0.

        Raises:
            ValueError: targets were summed, or a unit is no token of prompt or target.
        """
        from .inseq_atman import to_sequence_output

        return to_sequence_output(self)
