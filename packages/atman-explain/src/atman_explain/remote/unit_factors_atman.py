"""The factors of one passage, unit by unit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration_atman import IMAGE_KAPPA, AtManConfig
from .factors_atman import conceptual_factors, cosine_similarities, neighboring_patches
from .prompts_atman import ImageColumns
from .units_atman import Unit, overlap_factor


class UnitFactors:
    """Makes the factors of all columns for each unit, when they are needed.

    Args:
        units: of one passage.
        embeds: [T, D], input embeddings of the passage.
        images: where its images are.
        config: factor, similarity threshold and reach.
    """

    def __init__(
        self, units: Sequence[Unit], embeds: Tensor, images: Sequence[ImageColumns], config: AtManConfig
    ) -> None:
        self._units = units
        self._embeds = embeds
        self._images = images
        self._config = config
        self._starts: dict[int, int] = {}

    def row(self, index: int) -> Tensor:
        """Factors [T] of a unit, float64, on the CPU. Several tokens: for each column the one farthest from 1."""
        unit, factor = self._units[index], self._config.suppression_factor
        columns = list(unit.columns)
        row = torch.ones(self._embeds.shape[0], dtype=torch.float64)
        kappa = self._config.kappa if self._config.kappa is not None or unit.kind != "image" else IMAGE_KAPPA
        if kappa is not None:
            rows = conceptual_factors(
                cosine_similarities(self._embeds, columns).double().cpu(),
                factor,
                kappa,
                scale_by_similarity=self._config.scale_by_similarity,
                max_similar=self._config.max_similar,
            )
            row = rows.amin(0) if factor <= 1 else rows.amax(0)
        if unit.kind == "image" and self._config.neighbourhood:
            row[self._neighbors(unit)] = factor
        shares = unit.shares or (1.0,) * len(columns)
        row[columns] = torch.tensor([overlap_factor(factor, share) for share in shares], dtype=torch.float64)
        return row

    def start(self, index: int) -> int:
        """The first column whose factor is not 1; T if there is none."""
        if index not in self._starts:
            changed = (self.row(index) != 1).nonzero()
            self._starts[index] = int(changed[0]) if len(changed) else self._embeds.shape[0]
        return self._starts[index]

    def _neighbors(self, unit: Unit) -> list[int]:
        image = self._images[unit.image or 0]
        patches = {image.columns.index(column) for column in unit.columns}
        reach = self._config.neighbourhood
        near = {each for patch in patches for each in neighboring_patches(patch, image.grid, reach)}
        return [image.columns[patch] for patch in sorted(near)]
