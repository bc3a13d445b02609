"""How well a whole coder reconstructs activations, and how its latents hold the concepts; in one pass over the rows."""

import torch
from torch import Tensor

from ..coder import CoderWeights
from ..coding import Coded, code
from ..config import ScarConfig
from ..losses import reconstruction_loss
from ..monosemanticity import Monosemanticity, fms
from ..training.activations import ActivationRows
from .detection import is_for_fitting

_CELLS_PER_CHUNK = 1 << 24  # dense latents of a chunk of rows stay below 64 MB


class CoderStatistics:
    """Sums over the rows of a dataset, from which one coder's quality follows."""

    def __init__(self, weights: CoderWeights, config: ScarConfig) -> None:
        wide = CoderWeights(*(each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in weights))
        # Whole columns are read for every row, so they lie in one piece.
        self._weights, self._config = wide._replace(decoder=wide.decoder.T.contiguous().T), config
        n, d = weights.encoder.shape
        device = weights.encoder.device
        self.rows = 0
        self._nmse = self._error = self._square = self._kth = 0.0
        self._active = 0
        self._sum = torch.zeros(d, dtype=torch.float64, device=device)
        self._fired = torch.zeros(n, dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, rows: ActivationRows, layer: int, sample: "LatentSample | None" = None) -> None:
        """Code the activations of one layer and count them; `sample` keeps latents of them."""
        n = self._fired.shape[0]
        size = max(1, _CELLS_PER_CHUNK // n)
        for start in range(0, len(rows.pos), size):
            part = rows.take(slice(start, start + size))
            x = part.acts[layer].to(self._fired.device)
            coded = code(x, self._weights, self._config)
            self._count(x.to(coded.reconstruction.dtype), coded)
            if sample is not None:
                dense = coded.latents.new_zeros(len(x), n).scatter_(1, coded.indices.long(), coded.latents)
                sample.add(dense.cpu(), part)

    @property
    def nmse(self) -> float:
        """Mean over rows of the normalized squared error."""
        return self._nmse / self.rows

    @property
    def explained_variance(self) -> float:
        """Share of the rows' variance that reconstructions explain; NaN if all rows are equal."""
        total = self._square - float(self._sum.square().sum()) / self.rows
        return 1 - self._error / total if total > 0 else float("nan")

    @property
    def l0(self) -> float:
        """Mean number of latents that are not 0."""
        return self._active / self.rows

    @property
    def dead_fraction(self) -> float:
        """Share of latents that are 0 on all rows."""
        return float((~self._fired).double().mean())

    @property
    def mean_kth(self) -> float:
        """Mean of the smallest pre-activation that the selection keeps: tau of the gate "threshold"."""
        return self._kth / self.rows

    @property
    def mean(self) -> Tensor:
        """Mean row [d]."""
        return self._sum / self.rows

    def _count(self, x: Tensor, coded: Coded) -> None:
        self.rows += len(x)
        self._nmse += float(reconstruction_loss(coded.reconstruction, x).double().sum())
        self._error += float((coded.reconstruction.double() - x.double()).square().sum())
        self._square += float(x.double().square().sum())
        self._sum += x.double().sum(0)
        is_on = coded.latents != 0
        self._active += int(is_on.sum())
        self._fired[coded.indices[is_on].long()] = True
        selected = coded.values[:, self._config.always_kept :]
        self._kth += float(selected.amin(1).double().sum()) if selected.shape[1] else 0.0


class LatentSample:
    """All latents of some texts (their mean over tokens) or of some tokens, with labels."""

    def __init__(self, capacity: int, by_text: bool, seed: int = 0) -> None:
        """Keep the first `capacity` texts, or as many tokens of all, drawn at random."""
        self._capacity, self._by_text = capacity, by_text
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[int, tuple[Tensor, int, Tensor]] = {}  # text -> sum of latents, tokens, labels
        self._keys = torch.zeros(0)
        self._latents, self._labels, self._texts = torch.zeros(0), torch.zeros(0), torch.zeros(0)

    def add(self, latents: Tensor, rows: ActivationRows) -> None:
        """Take some tokens: latents [N, n] and what `rows` says of them."""
        if self._by_text:
            self._add_texts(latents, rows)
        else:
            self._add_tokens(latents, rows)

    def fms(self, concept: int) -> Monosemanticity | None:
        """Monosemanticity of a concept: fitted on half of the texts, judged on the others. None: a class is missing."""
        latents, labels, texts = self._table()
        marks, fits = labels[:, concept], is_for_fitting(texts)
        trains, tests = fits & (marks >= 0), ~fits & (marks >= 0)
        if any(len(marks[part].unique()) < 2 for part in (trains, tests)):
            return None
        return fms(latents[trains], marks[trains], latents[tests], marks[tests])

    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self._by_text:
            return self._latents, self._labels, self._texts
        texts = sorted(self._sums)
        latents = torch.stack([self._sums[text][0] / self._sums[text][1] for text in texts])
        return latents, torch.stack([self._sums[text][2] for text in texts]), torch.tensor(texts)

    def _add_texts(self, latents: Tensor, rows: ActivationRows) -> None:
        for text in rows.seq_id.unique().tolist():
            is_its = rows.seq_id == text
            if text not in self._sums and len(self._sums) >= self._capacity:
                continue
            total, tokens, labels = self._sums.get(text, (torch.zeros(latents.shape[1]), 0, rows.labels[is_its][0]))
            labels = torch.maximum(labels, rows.labels[is_its].amax(0))
            self._sums[text] = (total + latents[is_its].sum(0), tokens + int(is_its.sum()), labels)

    def _add_tokens(self, latents: Tensor, rows: ActivationRows) -> None:
        keys = torch.rand(len(latents), generator=self._generator)
        if len(self._keys):
            keys = torch.cat([self._keys, keys])
            latents = torch.cat([self._latents, latents])
            labels, texts = torch.cat([self._labels, rows.labels]), torch.cat([self._texts, rows.seq_id])
        else:
            labels, texts = rows.labels, rows.seq_id
        kept = keys.argsort()[: self._capacity]
        self._keys, self._latents, self._labels, self._texts = keys[kept], latents[kept], labels[kept], texts[kept]
