"""The training loop: batches in, steps, log, validation and checkpoints out."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..metrics import auroc
from .activations import ActivationRows
from .arguments import ScarTrainingArguments
from .checkpoint import load_checkpoint, read_state, save_checkpoint
from .objective import CoderLoss, SparseCoder

_LOGGED = {"loss": "loss", "reconstruction": "nmse", "concept": "concept_loss", "l1": "l1", "l0": "l0"}
"""Fields of `CoderLoss` and what the log calls them."""

EVAL_EPOCHS = 5
"""Epochs between validations, unless told otherwise."""


class Sampler(Protocol):
    """Where batches come from."""

    def batches_from(self, step: int) -> Iterator[ActivationRows]:
        """Batches of all steps from `step` on, without end."""

    def state(self) -> dict[str, Tensor]:
        """What is needed beside the step to go on."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""


class CoderStack(nn.Module):
    """The coders of all layers; one forward pass, so that one wrapper serves all."""

    def __init__(self, coders: Mapping[int, SparseCoder]) -> None:
        """Take coders by layer."""
        super().__init__()
        self.coders = nn.ModuleDict({str(layer): coder for layer, coder in coders.items()})

    def forward(
        self, acts: Mapping[int, Tensor], labels: Tensor, dead: Mapping[int, Tensor | None]
    ) -> dict[int, CoderLoss]:
        """The loss of each layer."""
        return {layer: coder(acts[layer], labels, dead[layer]) for layer, coder in self.items()}

    def items(self) -> Iterator[tuple[int, SparseCoder]]:
        """Layers and their coders."""
        return ((int(name), coder) for name, coder in self.coders.items())  # type: ignore[misc]


class TrainingRun:
    """One run over the steps of a training; what is not in here does not change while it trains."""

    def __init__(
        self,
        accelerator: Accelerator,
        stack: CoderStack,
        sampler: Sampler,
        args: ScarTrainingArguments,
        *,
        total_steps: int,
        steps_per_epoch: int | None,
        concepts: Iterable[str],
        identity: Mapping[str, Any],
        on_log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            accelerator: of this process.
            stack: the coders, on their devices.
            sampler: of this process.
            args: settings.
            total_steps: where the run ends.
            steps_per_epoch: None for a stream.
            concepts: names, for the log.
            identity: what must be equal for a checkpoint to be continued, beside the settings in `args`.
            on_log: called with each entry of the log.
        """
        self.accelerator, self.stack, self.sampler, self.args = accelerator, stack, sampler, args
        self.total_steps, self.steps_per_epoch, self.concepts = total_steps, steps_per_epoch, list(concepts)
        self.log_history: list[dict[str, float]] = []
        self._on_log = on_log
        own = {"processes": accelerator.num_processes, "total_steps": total_steps}
        self._identity = {**own, **identity, **args.what_shapes_the_weights()}
        self._step = 0
        parameters = list(stack.parameters())
        is_fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=is_fused)
        self._wrapped = accelerator.prepare_model(stack) if accelerator.num_processes > 1 else stack
        self._sums = {
            layer: torch.zeros(len(_LOGGED) + 1, dtype=torch.float64, device=coder.encoder.device)
            for layer, coder in stack.items()
        }
        self._since = 0  # steps that `_sums` sums over

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with other settings, which the message names.
        """
        state = read_state(folder)
        for name, value in state["identity"].items():
            if self._identity.get(name) != value:
                raise ValueError(f"{name} must be {value!r} to go on from {folder}, got {self._identity.get(name)!r}.")
        _, own = load_checkpoint(folder, self.stack, self.optimizer, rank=self.accelerator.process_index)
        self.sampler.load_state(own)
        self._step, self.log_history = state["step"], state["log_history"]
        for layer, sums in self._sums.items():
            sums.copy_(torch.tensor(state["sums"][str(layer)], dtype=torch.float64))
        self._since = state["since"]

    def train(self, validation: Callable[[], Iterable[ActivationRows]] | None) -> dict[str, float]:
        """Train to the end and return the last validation (empty without one)."""
        if self.args.unit_norm_decoder and self._step == 0:
            self._normalize_decoders()
        batches = self.sampler.batches_from(self._step)
        is_quiet = not (self.args.progress_bar and self.accelerator.is_main_process)
        with tqdm(total=self.total_steps, initial=self._step, desc="train", unit="step", disable=is_quiet) as bar:
            while self._step < self.total_steps:
                self._train_step(next(batches))
                bar.update()
                is_last = self._step == self.total_steps
                if is_last or self._is_due(self.args.log_steps):
                    entry = self._log(self._averages())
                    bar.set_postfix({name: f"{value:.4f}" for name, value in entry.items() if name.startswith("nmse")})
                if validation and (is_last or self._is_due(self._eval_steps())):
                    self._log(self.evaluate(validation()))
                if self.args.save_steps and (is_last or self._is_due(self.args.save_steps)):
                    self._save()
        return next(
            (entry for entry in reversed(self.log_history) if any(name.startswith("eval_") for name in entry)), {}
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ActivationRows]) -> dict[str, float]:
        """Losses, and for each concept the AUROC of its pre-activation on tokens, over all processes."""
        sums = {layer: torch.zeros_like(values[:-1]) for layer, values in self._sums.items()}
        scores: dict[int, list[Tensor]] = {layer: [torch.zeros(0, len(self.concepts))] for layer in self._sums}
        labels = [torch.zeros(0, len(self.concepts))]
        for batch in batches:
            labels.append(batch.labels.float())
            for layer, coder in self.stack.items():
                sums[layer] += _values(coder(batch.acts[layer], batch.labels)) * len(batch.seq_id)
                scores[layer].append(coder.concept_scores(batch.acts[layer]).cpu())
        known = self._gather(torch.cat(labels))
        result: dict[str, float] = {}
        for layer in self._sums:
            means = self.accelerator.reduce(sums[layer]) / max(1, len(known))
            result |= {
                f"eval_{name}/{layer}": value for name, value in zip(_LOGGED.values(), means.tolist(), strict=True)
            }
            found = self._gather(torch.cat(scores[layer]))
            for c, concept in enumerate(self.concepts):
                is_known = known[:, c] >= 0
                result[f"eval_auroc_{concept}/{layer}"] = _auroc(found[is_known, c], known[is_known, c] >= 0.5)
        return result

    def _train_step(self, batch: ActivationRows) -> None:
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate_at(self._step, self.total_steps)
        dead = {
            layer: coder.rows_since_fired >= args.dead_after_tokens if args.auxk else None
            for layer, coder in self.stack.items()
        }
        losses: dict[int, CoderLoss] = self._wrapped(batch.acts, batch.labels, dead)
        home = self.accelerator.device  # layers of a split model have their own
        self.accelerator.backward(torch.stack([loss.loss.to(home) for loss in losses.values()]).sum())
        for layer, coder in self.stack.items():
            norm = nn.utils.clip_grad_norm_(coder.parameters(), args.max_grad_norm or math.inf)
            self._sums[layer] += torch.cat([_values(losses[layer]), norm.detach().double()[None]])
            coder.count_fired(self._anywhere(losses[layer].fired), args.batch_tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._since += 1
        self._step += 1
        if args.unit_norm_decoder:
            self._normalize_decoders()

    def _averages(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        entry = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        for layer, coder in self.stack.items():
            means = (self.accelerator.reduce(self._sums[layer], "mean") / self._since).tolist()
            names = [*_LOGGED.values(), "grad_norm"]
            entry |= {f"{name}/{layer}": value for name, value in zip(names, means, strict=True)}
            entry[f"dead_share/{layer}"] = (coder.rows_since_fired >= self.args.dead_after_tokens).float().mean().item()
            self._sums[layer].zero_()
            if not math.isfinite(loss := entry[f"loss/{layer}"]):
                warnings.warn(
                    f"the loss of layer {layer} is {loss} after step {self._step}; the activations hold "
                    "NaN or infinity (a float16 model may need bfloat16), or learning_rate is too high.",
                    stacklevel=2,
                )
        self._since = 0
        return entry

    def _log(self, values: Mapping[str, float]) -> dict[str, float]:
        entry = {"step": self._step, **values}
        if self.steps_per_epoch:
            entry["epoch"] = self._step / self.steps_per_epoch
        self.log_history.append(entry)
        if self._on_log and self.accelerator.is_main_process:
            self._on_log(entry)
        return entry

    def _save(self) -> None:
        state = {
            "step": self._step,
            "since": self._since,
            "sums": {str(layer): sums.tolist() for layer, sums in self._sums.items()},
            "log_history": self.log_history,
            "identity": self._identity,
        }
        save_checkpoint(
            Path(self.args.output_dir),
            self._step,
            self.stack,
            self.optimizer,
            state,
            self.sampler.state(),
            rank=self.accelerator.process_index,
            barrier=self.accelerator.wait_for_everyone,
            keep=self.args.save_total_limit,
        )

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._step % every == 0

    def _eval_steps(self) -> int | None:
        return self.args.eval_steps or (self.steps_per_epoch and EVAL_EPOCHS * self.steps_per_epoch)

    def _normalize_decoders(self) -> None:
        for coder in dict(self.stack.items()).values():
            coder.normalize_decoder_()

    def _anywhere(self, flags: Tensor) -> Tensor:
        return self.accelerator.reduce(flags.int()) > 0 if self.accelerator.num_processes > 1 else flags

    def _gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, which may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        device = self.accelerator.device
        most = int(self.accelerator.gather(torch.tensor([len(rows)], device=device)).max())
        padded = torch.full((most, rows.shape[1] + 1), math.nan, device=device)
        padded[: len(rows), :-1], padded[: len(rows), -1] = rows.to(device), 1.0
        gathered = self.accelerator.gather(padded)
        return gathered[gathered[:, -1] == 1.0, :-1].cpu()


def _auroc(scores: Tensor, is_positive: Tensor) -> float:
    """NaN where there is nothing to compare: one class only, or scores of a training that diverged."""
    if scores.isnan().any() or is_positive.all() or not is_positive.any():
        return math.nan
    return auroc(scores, is_positive.long())


def _values(loss: CoderLoss) -> Tensor:
    """The logged parts `[5]`."""
    return torch.stack([getattr(loss, name).detach().double() for name in _LOGGED])
