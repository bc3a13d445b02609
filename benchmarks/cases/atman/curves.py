"""What of AtMan is measured at growing size; `benchmarks.scaling` turns each entry into a curve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atman_explain import AtMan
from benchmarks.atman_peers import captum_method, one_by_one
from benchmarks.cases.atman.inputs import FACTOR, QUICK, SHAPES, Shape, columns_of, factors_of, model_of, prompt_of
from benchmarks.cases.tfree.inputs import default_dtype
from benchmarks.harness import Call, Options

UNITS = {False: 256, True: 16}  # tokens of the prompt whose units are counted, by quick


def _shape(T: int, options: Options) -> Shape:
    return replace(QUICK if options.quick else SHAPES[options.device]["curve"], T=T)


def _model(options: Options) -> Any:
    return model_of(_shape(0, options), options.device, default_dtype(options))  # the same at every length


def _explain(T: int, options: Options) -> Call:
    atman = AtMan(_model(options), None, factor=FACTOR, show_progress=False)
    ids, target = prompt_of(_shape(T, options))
    return lambda: atman.explain(ids, target=[target])


def _one_by_one(T: int, options: Options) -> Call:
    model, shape = _model(options), _shape(T, options)
    ids, target = prompt_of(shape)
    factors = factors_of(shape, columns_of(shape, T))
    return lambda: one_by_one(model, ids, target, factors)


def _integrated_gradients(T: int, options: Options) -> Call:
    call = captum_method("IntegratedGradients", _model(options), *prompt_of(_shape(T, options)), n_steps=50)
    if call is None:
        raise ModuleNotFoundError("captum is not installed")
    return call


def _units(count: int, options: Options) -> Call:
    shape = _shape(UNITS[options.quick], options)
    atman = AtMan(_model(options), None, factor=FACTOR, show_progress=False)
    (ids, target), units = prompt_of(shape), columns_of(shape, count)
    return lambda: atman.explain(ids, target=[target], chunks=units)


CURVES: dict[str, dict[str, Any]] = {
    "atman.explain": {
        "axis": "T",
        "smallest": {"cpu": 32, "cuda": 64},
        "quick_smallest": 4,
        "expected": 2.0,
        "make": _explain,
    },
    "atman.units": {
        "axis": "U",
        "smallest": {"cpu": 4, "cuda": 16},
        "quick_smallest": 1,
        "expected": 1.0,
        "make": _units,
    },
    "atman.one_by_one": {
        "axis": "T",
        "smallest": {"cpu": 32},
        "quick_smallest": 4,
        "expected": 2.0,
        "make": _one_by_one,
        "is_landmark": True,
    },
    "atman.integrated_gradients": {
        "axis": "T",
        "smallest": {"cpu": 32},
        "quick_smallest": 4,
        "expected": 1.0,
        "make": _integrated_gradients,
        "is_landmark": True,
    },
}
