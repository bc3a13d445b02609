"""The forward hook that reads and steers a module's output. No module is replaced: names and classes stay the same."""

import inspect
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .kernels_scar import scar_scores, scar_steer
from .passes_scar import Pass
from .rows_scar import FoldedConcepts
from .settings_scar import ConceptSettings, Gate
from .strengths_scar import NOTHING, Group, Plan, Wishes, make_plan, overwrite, parts_of

Plans: TypeAlias = dict[str, Plan]


class Recorder(Protocol):
    """Wants to see activations; see `record_scores`."""

    def add(self, layer: "SteeringHook", place: Pass, hidden: Tensor) -> None:
        """Take note of what a layer put out in one pass."""


class _Override(NamedTuple):
    wishes: dict[str, Wishes]
    plans: Plans


OVERRIDES: ContextVar[Mapping["SteeringHook", _Override]] = ContextVar("scar_overrides", default=MappingProxyType({}))
"""Temporary steering, by layer. A context variable, so that threads and tasks do not see each other's."""

RECORDERS: ContextVar[Mapping["SteeringHook", tuple[Recorder, ...]]] = ContextVar(
    "scar_recorders", default=MappingProxyType({})
)
"""Who wants the scores, by layer."""

PROMPT: ContextVar[int | None] = ContextVar("scar_prompt", default=None)
"""Number of tokens of the prompt, while `generate` runs."""


class SteeringHook:
    """Steers the output of one module for one or more adapters.

    A mixin for the `nn.Module` that holds their weights, to be named before it.

    A subclass says what it holds: `concept_rows`, `concept_settings`, `place`, `adapters_here`, `adapters_in_use`; one
    that holds whole coders also `own_gate`, `kept` and `reconstruction`.
    """

    layer_index: int
    """Index of the block among the model's blocks."""

    def concept_rows(self, adapter: str) -> FoldedConcepts:
        """The folded weights of all concepts of an adapter."""
        raise NotImplementedError

    def concept_settings(self, adapter: str) -> ConceptSettings:
        """How an adapter reads and steers."""
        raise NotImplementedError

    def place(self, adapter: str) -> tuple[torch.device, torch.dtype]:
        """Device and dtype (float32 or wider) of an adapter's strengths."""
        raise NotImplementedError

    def adapters_here(self) -> list[str]:
        """Adapters that hold weights here."""
        raise NotImplementedError

    def adapters_in_use(self) -> list[str]:
        """Those of them that act now."""
        raise NotImplementedError

    def own_gate(self, adapter: str) -> Gate:
        """What decides in the coder itself whether a concept is on; it holds where activations are reconstructed."""
        raise NotImplementedError

    def kept(self, adapter: str, hidden: Tensor) -> Tensor:
        """Which concepts are among the k largest latents [..., C]."""
        raise NotImplementedError

    def reconstruction(self, adapter: str, hidden: Tensor) -> Tensor:
        """What the whole coder makes of `hidden` [..., d]."""
        raise NotImplementedError

    def attach(self, target: nn.Module, owner: nn.Module) -> None:
        """Steer the output of `target` from now on; `owner` is the module that is given masks and positions."""
        self._target = (target,)  # in a tuple, so that it is not registered below this module
        self._arguments = tuple(inspect.signature(owner.forward).parameters)
        self._wishes: dict[str, Wishes] = {}
        self._plans: Plans = {}
        self._live: Plans = {}
        self._live_recorders: tuple[Recorder, ...] = ()
        self._passes: dict[int, Pass] = {}
        self._last_pass = Pass()
        # Before other hooks: transformers reads `hidden_states` in hooks of its own, and must find the steered ones.
        self._handles = [
            target.register_forward_hook(self._steer, prepend=True),
            owner.register_forward_pre_hook(self._observe, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Leave the target as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: not the inputs that the model has last seen."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {**state, "_passes": {}, "_last_pass": Pass(), "_live_recorders": ()}

    def wishes(self, adapter: str, *, temporary: bool = True) -> Wishes:
        """What is wanted of an adapter: here and now, or behind all open `steering` blocks."""
        override = OVERRIDES.get().get(self) if temporary else None
        found = None if override is None else override.wishes.get(adapter)
        return found or self._wishes.get(adapter, NOTHING)

    def plan_for(self, adapter: str, wishes: Wishes) -> Plan:
        """How this layer fulfils them; changes nothing yet."""
        return make_plan(wishes, self.concept_settings(adapter), *self.place(adapter))

    def keep(self, adapter: str, wishes: Wishes, plan: Plan) -> None:
        """Fulfil them until told otherwise."""
        self._wishes[adapter], self._plans[adapter] = wishes, plan
        self.refresh()

    def forget(self, adapter: str) -> None:
        """Drop all that is wanted of an adapter."""
        for each in (self._wishes, self._plans, self._live):
            each.pop(adapter, None)

    def replan(self) -> None:
        """Make all plans anew, after the weights went to another device or dtype."""
        self._plans = {adapter: self.plan_for(adapter, wishes) for adapter, wishes in self._wishes.items()}
        self._live = {}
        self.refresh()

    def refresh(self) -> None:
        """Write what holds now to where a compiled graph reads it, in place where the form stays the same."""
        self._live_recorders = RECORDERS.get().get(self, ())
        live: Plans = {}  # put in place at once, because other threads may do the same
        for adapter, plan in self._current_plans().items():
            old = self._live.get(adapter)
            live[adapter] = old if old is not None and overwrite(old, plan) else _copied(plan)
        self._live = live

    def _current_plans(self) -> Plans:
        override = OVERRIDES.get().get(self)
        return self._plans if override is None else {**self._plans, **override.plans}

    def _in_use(self) -> tuple[Plans, tuple[Recorder, ...]]:
        """Plans of the acting adapters that change something, and who wants their scores."""
        is_compiling = torch.compiler.is_compiling()
        plans = self._live if is_compiling else self._current_plans()
        recorders = self._live_recorders if is_compiling else RECORDERS.get().get(self, ())
        if not plans and not recorders:
            return {}, ()
        names = self.adapters_in_use()
        acting = {name: plans[name] for name in names if name in plans and not plans[name].is_neutral}
        return acting, recorders if names else ()

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plans, recorders = self._in_use()
        if not plans and not recorders:
            return
        self._last_pass = Pass.of({**dict(zip(self._arguments, args, strict=False)), **kwargs})
        if torch.compiler.is_compiling():
            self._passes = {}
        else:
            self._passes[threading.get_ident()] = self._last_pass

    def _observed(self) -> Pass:
        """The pass in progress. Autograd computes blocks again in threads of its own: the last pass is theirs."""
        if torch.compiler.is_compiling():
            return self._last_pass
        return self._passes.get(threading.get_ident(), self._last_pass)

    def _steer(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook. None, at no cost, where nothing is to be done."""
        plans, recorders = self._in_use()
        if not plans and not recorders:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.numel():
            return None
        rows = self._by_row(hidden)
        if recorders:
            _record(self, recorders, self._observed(), rows)
        if not plans:
            return None
        steered = self._steered(plans, rows).view(hidden.shape)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def _by_row(self, hidden: Tensor) -> Tensor:
        """`hidden` as [B, L, d], also where a family (OPT) lays the tokens of all rows one after the other."""
        shape = self._observed().shape if hidden.ndim == 2 else None
        return hidden if shape is None else hidden.view(*shape, -1)

    def _steered(self, plans: Plans, hidden: Tensor) -> Tensor:
        if len(plans) == 1:
            ((adapter, plan),) = plans.items()
            if plan.mode == "residual" and len(plan.groups) == 1:
                return self._changed(adapter, plan, plan.groups[0], hidden)
        # Several changes: each is computed from the same activations, in a fixed order, and all are added.
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        change = torch.zeros_like(wide)
        for adapter, plan in sorted(plans.items()):
            if plan.mode == "reconstruct":
                change = change + (self.reconstruction(adapter, wide) - wide)
            for group in plan.groups:
                change = change + (self._changed(adapter, plan, group, wide) - wide)
        return (wide + change).to(hidden.dtype)

    def _changed(self, adapter: str, plan: Plan, group: Group, hidden: Tensor) -> Tensor:
        """Activations with the concepts of one group changed."""
        applies = self._applies(group, hidden)
        if applies is False:
            return hidden
        settings, rows = self.concept_settings(adapter), self.concept_rows(adapter)
        if plan.mode == "reconstruct":
            settings = replace(settings, gate=self.own_gate(adapter))
        is_open = self.kept(adapter, hidden) if settings.gate == "topk" else None
        if len(group.concepts) != rows.encoder.shape[0]:
            chosen = list(group.concepts)
            rows = FoldedConcepts(*(each[chosen] for each in rows))
            is_open = None if is_open is None else is_open[..., chosen]
        steered, _ = scar_steer(
            hidden,
            *rows,
            parts_of(group.values, hidden.shape[0]).to(hidden.device),
            rule=group.rule,
            activation=settings.activation,
            threshold=settings.open_above,
            is_open=is_open,
            eps=settings.norm_eps,
            normalize=settings.normalize,
        )
        return steered if applies is True else torch.where(applies[..., None], steered, hidden)

    def _applies(self, group: Group, hidden: Tensor) -> bool | Tensor:
        """Which tokens are steered, as a mask that broadcasts to [B, L]."""
        if hidden.ndim != 3:
            return True
        (batch, length), place = hidden.shape[:2], self._observed()
        applies: bool | Tensor = True
        if group.positions != "all":
            applies = place.is_generated(length, PROMPT.get(), hidden.device) == (group.positions == "generated")
        if applies is False or not group.skips_first_token:
            return applies
        return ~place.is_first(batch, length, hidden.device) & applies

    def scores(self, adapter: str, hidden: Tensor, kind: str) -> Tensor:
        """Pre-activations or latents of all concepts [..., C], without gradients."""
        settings = self.concept_settings(adapter)
        with torch.no_grad():
            rows = self.concept_rows(adapter)
            pre = scar_scores(hidden, *rows[:3], eps=settings.norm_eps, normalize=settings.normalize)
            if kind == "pre":
                return pre
            is_open = self.kept(adapter, hidden) if settings.gate == "topk" else ~(pre <= settings.open_above)
            return torch.where(is_open, getattr(torch, settings.activation)(pre), 0.0)


@torch.compiler.disable
def _record(layer: SteeringHook, recorders: tuple[Recorder, ...], place: Pass, hidden: Tensor) -> None:
    for recorder in recorders:
        recorder.add(layer, place, hidden.detach())


def _copied(plan: Plan) -> Plan:
    with torch.inference_mode(False):  # so that it can be written to in any mode
        return Plan(plan.mode, tuple(replace(group, values=group.values.clone()) for group in plan.groups))
