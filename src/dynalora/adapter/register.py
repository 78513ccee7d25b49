"""Making a method known to PEFT."""

from __future__ import annotations

import sys
import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from dynalora.adapter.method import Method
from dynalora.adapter.model import AdapterModel
from dynalora.common.private import peft_type

METHODS: dict[str, Method] = {}


def register(method_class: type[Method]) -> type[Method]:
    """Class decorator that registers a method with dynalora and with PEFT, under `PeftType.<NAME>`.

    Where PEFT already knows a method of that name, it stays PEFT's, with a warning.
    """
    method = method_class()
    name = method.name
    if peft_type(name) in PEFT_TYPE_TO_TUNER_MAPPING:
        warnings.warn(
            f"PEFT already has a method called {name!r}, of its own or of another package, so dynalora's "
            f"{method.config_class.__name__} is left out and all else works; to have it, use a version of PEFT "
            "without that method, or do not import the other package.",
            stacklevel=2,
        )
        return method_class
    model_class = type(
        f"{name.capitalize()}Model",
        (AdapterModel,),
        {
            "__doc__": f"PEFT tuner of {name}.",
            "__module__": method_class.__module__,
            "prefix": f"{name}_",
            "tuner_layer_cls": method.layer_class,
            "method": method,
        },
    )
    # where pickle looks for it
    setattr(sys.modules[method_class.__module__], model_class.__name__, model_class)
    register_peft_method(name=name, config_cls=method.config_class, model_cls=model_class)
    METHODS[name] = method
    return method_class
