"""`ScarTrainer`: trains the coders of a SCAR adapter on a labelled dataset."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn

from ..layer import scar_layers
from .activations import ActivationRows, activation_windows
from .arguments import ScarTrainingArguments
from .checkpoint import latest_checkpoint
from .harvest import harvest, warn_of_single_class
from .labels import LabelReader
from .objective import CoderSettings, SparseCoder
from .run import CoderStack, TrainingRun
from .sampler import StoreSampler, StreamSampler, is_held_out, validation_batches
from .store import ActivationStore


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did."""

    steps: int
    """Number of steps, those before a resumption included."""

    log_history: list[dict[str, float]]
    """One entry per `log_steps` and per validation. Keys of a layer end in `/<layer>`."""

    metrics: dict[str, float]
    """The last validation."""


class ScarTrainer:
    """Trains an adapter's coders on the frozen model's activations, with labels for its concepts.

    Activations are computed once, up to the last layer that is needed, and kept on disk; training then reads them in a
    shuffled order. With `accelerate launch`, processes share both. A run that was stopped goes on bit by bit as if it
    had not been.

    Example:
        >>> model = get_peft_model(base, ScarConfig(layers=[25], concepts=["toxicity"]))
        >>> arguments = ScarTrainingArguments("out", learning_rate=1e-4, num_epochs=3)
        >>> ScarTrainer(model, dataset, text_column="prompt", args=arguments, processing_class=tokenizer).train()
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        text_column: str = "text",
        label_columns: str | Sequence[str] | None = None,
        args: ScarTrainingArguments,
        processing_class: Any = None,
        eval_dataset: Any = None,
        adapter_name: str | None = None,
        on_log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: a model with a SCAR adapter: what `get_peft_model` returns, or any module tree with SCAR layers.
            dataset: rows with a text and labels: a `datasets.Dataset`, a list of dicts or an iterable of dicts.
            text_column: where the text is.
            label_columns: one column per concept in the order of the adapter's concepts, or one column with the values
                of all concepts, as a list or a dict. None: columns named like the concepts.
            args: settings.
            processing_class: the model's tokenizer. None: loaded from where the model came from.
            eval_dataset: rows for validation; None: a share of the texts of `dataset` is held out.
            adapter_name: which adapter to train. None: the active one.
            on_log: called with each entry of the log, in the main process.

        Raises:
            ValueError: the model has no adapter that can be trained, or labels and concepts do not fit.
        """
        self.model, self.dataset, self.eval_dataset, self.args, self.on_log = model, dataset, eval_dataset, args, on_log
        self.adapter_name = adapter_name or _active_adapter(model)
        self.layers = {layer.layer_index: layer for layer in scar_layers(model, self.adapter_name)}
        self.config = next(iter(self.layers.values())).config(self.adapter_name)
        concepts = tuple(self.config.concepts)
        columns = (label_columns,) if isinstance(label_columns, str) else tuple(label_columns or concepts)
        self.reader = LabelReader(
            concepts=concepts,
            columns=columns,
            text_column=text_column,
            level=args.label_level,
            threshold=args.label_threshold,
            soft=args.soft_labels,
        )
        self.processing_class = _tokenizer_of(model) if processing_class is None else processing_class
        self.log_history: list[dict[str, float]] = []
        self._check_trainable()
        hook = DDPCommunicationHookType.BF16 if args.grad_dtype == "bfloat16" else DDPCommunicationHookType.NO
        self.accelerator = Accelerator(
            mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=hook)]
        )
        if not hasattr(model, "hf_device_map") and not _is_quantized(model):
            model.to(self.accelerator.device)
        self._rank, self._processes = self.accelerator.process_index, self.accelerator.num_processes
        if args.grad_dtype == "bfloat16" and self._processes > 1 and self.accelerator.device.type == "cpu":
            raise ValueError('grad_dtype="bfloat16" needs processes on GPUs, got processes on cpu; use "float32".')
        if args.batch_tokens % self._processes:
            raise ValueError(
                f"batch_tokens must be a multiple of the number of processes ({self._processes}), "
                f"got {args.batch_tokens}."
            )

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainingResult:
        """Compute the activations if they are not there yet, and train.

        Args:
            resume_from_checkpoint: True for the latest checkpoint in `output_dir`, or the folder of one.

        Returns:
            The log and the last validation; the adapter in the model is trained.

        Raises:
            ValueError: the dataset does not fit, the store belongs to other data (the message names the field), or the
                checkpoint to other settings.
        """
        store = self._harvest(self.dataset, "train") if self.args.store == "disk" else None
        sampler = self._stored_rows(store) if store else self._streamed_rows()
        steps_per_epoch = sampler.steps_per_epoch if isinstance(sampler, StoreSampler) else None
        settings = self._settings(store)
        coders = {
            index: SparseCoder(layer.weights(self.adapter_name), settings) for index, layer in self.layers.items()
        }
        run = TrainingRun(
            self.accelerator,
            CoderStack(coders),
            sampler,
            self.args,
            total_steps=self.args.max_steps or math.ceil(self.args.num_epochs * (steps_per_epoch or 0)),
            steps_per_epoch=steps_per_epoch,
            concepts=self.config.concepts,
            identity=self._identity(store),
            on_log=self.on_log,
        )
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = latest_checkpoint(Path(self.args.output_dir))
            run.resume(Path(resume_from_checkpoint))
        metrics = run.train(self._validation(store))
        self.log_history = run.log_history
        return TrainingResult(run.total_steps, run.log_history, metrics)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the adapter, by default to `output_dir`; in the main process only."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(output_dir or self.args.output_dir)  # type: ignore[operator]
        self.accelerator.wait_for_everyone()

    @property
    def _held_out_share(self) -> float:
        return 0.0 if self.eval_dataset is not None else self.args.validation_share

    def _harvest(self, dataset: Any, part: str) -> ActivationStore:
        args = self.args
        root = Path(args.store_dir) if args.store_dir else Path(args.output_dir) / "activations"
        return harvest(
            self.model,
            self.processing_class,
            dataset,
            root / part,
            site=self.config.site,
            shard_tokens=args.shard_tokens,
            barrier=self.accelerator.wait_for_everyone,
            progress_bar=args.progress_bar,
            **self._reading(),
        )

    def _reading(self) -> dict[str, Any]:
        """How activations are read; what `harvest` and `activation_windows` have in common."""
        return {
            "reader": self.reader,
            "targets": {index: layer.get_base_layer() for index, layer in self.layers.items()},
            "batch_size": self.args.harvest_batch_size,
            "max_length": self.args.max_length,
            "drop_sink_tokens": self.args.drop_sink_tokens,
            "rank": self._rank,
            "processes": self._processes,
        }

    def _stored_rows(self, store: ActivationStore) -> StoreSampler:
        if self.accelerator.is_main_process:
            warn_of_single_class(store)
        return StoreSampler(
            store,
            self.args.batch_tokens // self._processes,
            buffer_rows=self.args.buffer_tokens,
            validation_share=self._held_out_share,
            seed=self.args.seed,
            rank=self._rank,
            processes=self._processes,
        )

    def _streamed_rows(self) -> StreamSampler:
        share = self._held_out_share
        return StreamSampler(
            lambda start: self._windows(self.dataset, lambda text: not is_held_out(text, share), start),
            self.args.batch_tokens // self._processes,
            buffer_rows=self.args.buffer_tokens,
            seed=self.args.seed,
            rank=self._rank,
        )

    def _windows(
        self, dataset: Any, is_wanted: Callable[[int], bool], start: int = 0
    ) -> Iterator[tuple[int, ActivationRows]]:
        return activation_windows(
            self.model, self.processing_class, dataset, is_wanted=is_wanted, start=start, **self._reading()
        )

    def _validation(self, store: ActivationStore | None) -> Callable[[], Iterable[ActivationRows]] | None:
        """What gives the rows for validation, once per call."""
        share = self._held_out_share
        if self.eval_dataset is None and not share:
            return None
        if store is None:
            if self.eval_dataset is not None:
                return lambda: (rows for _, rows in self._windows(self.eval_dataset, lambda _: True))
            return lambda: (rows for _, rows in self._windows(self.dataset, lambda text: is_held_out(text, share)))
        if self.eval_dataset is not None:
            store, share = self._harvest(self.eval_dataset, "eval"), 1.0
        rows = self.args.batch_tokens
        return lambda: validation_batches(store, rows, share, rank=self._rank, processes=self._processes)

    def _settings(self, store: ActivationStore | None) -> CoderSettings:
        args, config = self.args, self.config
        weights = [args.pos_weight]
        if store and args.balance_classes:
            counts = zip(store.positives, store.negatives, strict=True)
            weights = [args.pos_weight * negatives / max(1, positives) for positives, negatives in counts]
        return CoderSettings(
            k=config.kept,
            concepts=len(config.concepts),
            activation=config.activation,
            always=config.always_kept,
            eps=config.norm_eps,
            normalize=config.normalize,
            concept_weight=args.concept_weight,
            pos_weight=tuple(weights),
            unlabelled_as_negative=args.unlabelled_as_negative,
            soft_labels=args.soft_labels,
            auxk=args.auxk,
            auxk_weight=args.auxk_weight,
        )

    def _identity(self, store: ActivationStore | None) -> dict[str, Any]:
        """What a checkpoint must agree with, beside the arguments."""
        names = ("site", "concepts", "n_latents", "k", "activation", "concept_gate", "normalize", "norm_eps")
        data = {"dataset": store.origin.dataset, "weights": store.origin.weights} if store else {}
        return {"layers": sorted(self.layers), **{name: getattr(self.config, name) for name in names}, **data}

    def _check_trainable(self) -> None:
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "model must be decoder-only or encoder-only to be trained on texts, got one with both parts."
            )
        if self.config.compact:
            raise ValueError(
                "model must hold a full adapter to be trained, got a compact one, which has no other latents."
            )
        for layer in self.layers.values():
            if not all(tensor.requires_grad for tensor in layer.weights(self.adapter_name)):
                raise ValueError(
                    f"the adapter {self.adapter_name!r} must be trainable, got frozen weights; load it with "
                    "PeftModel.from_pretrained(..., is_trainable=True), or make it the active one."
                )


def _active_adapter(model: nn.Module) -> str:
    names: list[str] = scar_layers(model)[0].active_adapters  # type: ignore[assignment]
    if len(names) != 1:
        raise ValueError(f"adapter_name must be given, because several are active: {names}.")
    return names[0]


def _tokenizer_of(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise ValueError("processing_class must be given: the model does not say where it came from.")
    return AutoTokenizer.from_pretrained(name)


def _is_quantized(model: nn.Module) -> bool:
    return getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None
