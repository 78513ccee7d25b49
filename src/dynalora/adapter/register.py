"""Making a method known to PEFT."""

from __future__ import annotations

import sys

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from dynalora.adapter.method import Method
from dynalora.adapter.model import AdapterModel

METHODS: dict[str, Method] = {}


def register(method_class: type[Method]) -> type[Method]:
    """Class decorator that registers a method with dynalora and with PEFT, under `PeftType.<NAME>`."""
    method = method_class()
    name = method.name
    peft_type = _peft_type(name)
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
        raise RuntimeError(
            f"PEFT already has a method called {name!r}, of its own or of another package; dynalora cannot "
            "register its own "
            "beside it: use a PEFT version without it."
        )
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
    setattr(
        sys.modules[method_class.__module__], model_class.__name__, model_class
    )  # where pickle looks for it
    register_peft_method(name=name, config_cls=method.config_class, model_cls=model_class)
    METHODS[name] = method
    return method_class


def _peft_type(name: str) -> PeftType:
    """The member of PEFT's enumeration, added to it if need be.

    `register_peft_method` takes members only, and Python closes enumerations; a member is made here in the way that
    the `enum` module makes its own.
    """
    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    return member
