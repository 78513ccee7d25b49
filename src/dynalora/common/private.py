"""Everything the package takes from PEFT, transformers and torch that they do not promise to keep.

Each function says what it needs and why nothing public will do. `tests/unit/test_private_ground.py` has a test for
each, which fails with the reason when a new version of one of these libraries changes it. What subclasses of PEFT's
`BaseTuner` and `BaseTunerLayer` override under a name with an underscore stands in those subclasses; the same test
file compares its parameters with PEFT's.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft import LoraModel, PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners._buffer_dict import BufferDict as BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import CONFIG_NAME, load_peft_weights, save_and_load, set_peft_model_state_dict
from peft.utils.peft_types import PeftType
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import trainer as transformers_trainer
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer_callback import TrainerCallback

# torch's operations on lists of tensors, which its own optimizers are made of: one launch instead of one per tensor.
foreach_abs_ = torch._foreach_abs_
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sub_ = torch._foreach_sub_


# PEFT --------------------------------------------------------------------------------------------------------------


def features(layer: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a linear layer, quantised or not, as PEFT's own methods read them."""
    return cast("tuple[int, int]", _get_in_out_features(layer))


def resolve_all_linear(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """A configuration in which `target_modules="all-linear"` is replaced by the modules that PEFT means by it.

    PEFT does so in the middle of an injection only, and its rules for heads follow the task and the model.
    """
    return _maybe_include_all_linear_layers(config, model)


def tie_modules_to_save(tuner: BaseTuner, config: PeftConfig, tied: list[str]) -> None:
    """Let PEFT train the input embeddings in full, and what is tied to them by the same weight.

    Every tuner has to say so itself; LoRA's does it with nothing that is LoRA's own.

    Args:
        tuner: The tuner.
        config: The adapter's configuration, in whose `modules_to_save` the embeddings stand afterwards.
        tied: Names of the modules that are tied to them.
    """
    LoraModel._add_modules_to_save_to_tie(tuner, config, tied)  # type: ignore[arg-type]


def loads_what_fits() -> bool:
    """Whether PEFT, within whose loading this is called, was told to leave out what has another size.

    `set_peft_model_state_dict(ignore_mismatched_sizes=True)` leaves it out, with a warning, after it has given
    the tensors to the tuner, which it does not tell.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not set_peft_model_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("ignore_mismatched_sizes"))


def adapters_disabled(model: nn.Module) -> bool:
    """Whether a model's adapters are off; prompt learning has no layers that could be asked."""
    return bool(model._adapters_disabled)


@contextmanager
def without_updates(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside, adapted layers compute what their base layers do; afterwards each is as it was.

    `BaseTunerLayer.enable_adapters` also changes which parameters train, and unmerges.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def peft_type(name: str) -> PeftType:
    """The member `NAME` of PEFT's enumeration of methods, added to it if need be.

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


def extend_model_cards(written: Callable[[PeftModel, str], None], uploading: Callable[[PeftModel, str], None]) -> None:
    """Have functions called whenever a model card was written, and whenever a folder is about to be uploaded.

    Both get the model and the folder. PEFT chooses the class of the model, and writes the card, before it asks the
    adapter's own classes for anything; `push_to_hub` then writes another card over the one that was saved. Neither
    has a hook, so two methods of `PeftModel` are wrapped. A second call changes nothing.
    """
    write_card: Any = PeftModel.create_or_update_model_card
    if hasattr(write_card, "extended_by_dynalora"):
        return

    @functools.wraps(write_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        write_card(self, output_dir)
        written(self, str(output_dir))

    create_or_update_model_card.extended_by_dynalora = True  # type: ignore[attr-defined]
    setattr(PeftModel, "create_or_update_model_card", create_or_update_model_card)  # noqa: B010
    upload: Any = getattr(PeftModel, "_upload_modified_files", None)
    if upload is None:
        return

    @functools.wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        uploading(self, str(working_dir))
        return upload(self, working_dir, *args, **kwargs)

    setattr(PeftModel, "_upload_modified_files", upload_modified_files)  # noqa: B010


def after_failed_load(told: Callable[[PeftModel, str, str, Exception], Exception]) -> None:
    """Have a function called when `PeftModel.load_adapter` fails, which `from_pretrained` goes through, too.

    It gets the model, the adapter's name, the folder that it was to come from and the error, and returns the error to
    raise. PEFT makes the adapter before it reads the weights, and has no hook for taking it away again. A second call
    changes nothing.
    """
    load: Any = PeftModel.load_adapter
    if hasattr(load, "extended_by_dynalora"):
        return

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        except Exception as error:
            folder = os.path.join(model_id, kwargs.get("subfolder") or "")
            raised = told(self, adapter_name, folder, error)
            if raised is error:
                raise
            raise raised from error

    load_adapter.extended_by_dynalora = True  # type: ignore[attr-defined]
    setattr(PeftModel, "load_adapter", load_adapter)  # noqa: B010


def name_base_weights(told: Callable[[nn.Module, str], str]) -> None:
    """Have a function called where PEFT wants the name that a weight of a base model has without adapters.

    It gets the base model, in which the adapters are, and the weight's name there, and returns the name without what
    dynalora put around modules. `get_base_model_state_dict` and `set_base_model_state_dict` know PEFT's own wrappers
    only. A second call changes nothing.
    """
    original: Any = getattr(save_and_load, "_peft_key_to_original_key", None)  # older versions have no such functions
    if original is None or hasattr(original, "extended_by_dynalora"):
        return

    @functools.wraps(original)
    def _peft_key_to_original_key(model: Any, peft_key: str) -> str:
        return str(original(model, told(model.base_model.model, peft_key)))

    _peft_key_to_original_key.extended_by_dynalora = True  # type: ignore[attr-defined]
    setattr(save_and_load, "_peft_key_to_original_key", _peft_key_to_original_key)  # noqa: B010


def after_unread_method(told: Callable[[str], None]) -> None:
    """Have a function called when PEFT cannot find out which method made an adapter, before it says so in its own way.

    It gets the adapter's folder, and may raise what is to be said instead. PEFT reads the configuration before any
    method's code has its turn. A second call changes nothing.
    """
    read: Any = PeftConfigMixin._get_peft_type.__func__  # type: ignore[attr-defined]
    if hasattr(read, "extended_by_dynalora"):
        return

    @functools.wraps(read)
    def _get_peft_type(cls: Any, model_id: str, **kwargs: Any) -> Any:
        folder = os.path.join(model_id, kwargs.get("subfolder") or "")
        config = os.path.join(folder, CONFIG_NAME)
        if os.path.exists(config) and not os.path.isfile(config):
            told(folder)  # PEFT would wait for a pipe, or read a device without end
        try:
            kind = read(cls, model_id, **kwargs)
            known = kind in PEFT_TYPE_TO_CONFIG_MAPPING
        except Exception:
            told(folder)
            raise
        if not known:
            told(folder)
        return kind

    reader: Any = _get_peft_type
    reader.extended_by_dynalora = True
    setattr(PeftConfigMixin, "_get_peft_type", classmethod(reader))  # noqa: B010


# transformers ------------------------------------------------------------------------------------------------------


def add_default_callback(callback: type[TrainerCallback]) -> None:
    """Make a callback one of every `Trainer`'s, so that nobody has to pass it; a second call changes nothing."""
    defaults: list[type[TrainerCallback]] = transformers_trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if callback not in defaults:
        defaults.append(callback)


def after_load_by_transformers(told: Callable[[nn.Module, str, Callable[[], dict[str, torch.Tensor]]], None]) -> None:
    """Have a function called when a model of transformers has loaded an adapter (`from_pretrained` does so, too).

    It gets the model, the adapter's name, and what reads the adapter's tensors. transformers gives values to tensors
    that a model has, and leaves out all others. A second call changes nothing.
    """
    load: Any = PeftAdapterMixin.load_adapter
    if hasattr(load, "extended_by_dynalora"):
        return

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = load(self, peft_model_id, adapter_name, *args, **kwargs)

        def read() -> dict[str, torch.Tensor]:
            given: dict[str, torch.Tensor] | None = kwargs.get("adapter_state_dict")
            if given is not None:
                return given
            settings = kwargs.get("load_config")
            place = peft_model_id or getattr(settings, "pretrained_model_name_or_path", None)
            options = {**getattr(settings, "download_kwargs", {}), **(kwargs.get("adapter_kwargs") or {})}
            taken = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
            return load_peft_weights(
                str(place), device="cpu", **{key: options[key] for key in taken if options.get(key) is not None}
            )

        told(self, adapter_name or "default", read)
        return result

    load_adapter.extended_by_dynalora = True  # type: ignore[attr-defined]
    setattr(PeftAdapterMixin, "load_adapter", load_adapter)  # noqa: B010


# diffusers ---------------------------------------------------------------------------------------------------------

_changes = 0
_changed_at = WeakTensorKeyDictionary()  # no attributes, which would be saved with parameters


def note_new_slices(parameter: torch.Tensor, refuse: Callable[[], None]) -> None:
    """Have a function called that raises, before an average of diffusers' takes a parameter for what it was.

    Its `EMAModel` has a list of tensors, made as the parameters then were, and pairs them by their order: after a
    change of size it fails in the words of an addition, and with other slices of one size it averages what does not
    belong together. diffusers asks nobody, so two methods are wrapped, once a parameter has changed.

    Args:
        parameter: A parameter, some of whose slices are about to be others.
        refuse: Called by `step` and `copy_to` of averages that were made before.
    """
    global _changes
    average: Any = getattr(sys.modules.get("diffusers.training_utils"), "EMAModel", None)
    if average is not None and not hasattr(average, "changes_when_made"):
        average.changes_when_made = _changes  # of all that there are
        make = average.__init__

        @functools.wraps(make)
        def make_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
            self.changes_when_made = _changes
            make(self, *args, **kwargs)

        average.__init__ = make_and_note
        for name in ("step", "copy_to"):
            setattr(average, name, _asking_first(getattr(average, name), refuse))
    _changes += 1
    _changed_at[parameter] = _changes


def _asking_first(method: Any, refuse: Callable[[], None]) -> Any:
    @functools.wraps(method)
    def ask_first(self: Any, parameters: Any) -> Any:
        if not isinstance(parameters, nn.Module):
            parameters = list(parameters)
        own = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        if any(_changed_at.get(parameter, 0) > self.changes_when_made for parameter in own):
            refuse()
        return method(self, parameters)

    return ask_first


# torch -------------------------------------------------------------------------------------------------------------


def convolve(layer: nn.Module, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """What a convolution with other kernels and no bias makes of an input, with its own stride, padding and dilation.

    Args:
        layer: An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        x: Its input.
        kernels: The kernels, (outputs, channels per group, …).
    """
    # The functions of torch.nn.functional pad with zeros only.
    return cast(torch.Tensor, layer._conv_forward(x, kernels, None))  # type: ignore[operator]


def padded_input(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A convolution's input with its padding around it."""
    padding: Any = layer._reversed_padding_repeated_twice
    mode = str(layer.padding_mode)
    return nn.functional.pad(x, tuple(padding), mode="constant" if mode == "zeros" else mode)


def steps_around() -> list[Optimizer]:
    """Optimizers within whose `step` the one of the calling step hook takes place. To be called by the hook itself.

    A subclass that calls `super().step()` runs all hooks twice, since torch wraps the `step` of every class; and an
    optimizer around another (Lookahead, SAM) steps it within its own. A count kept by the hooks would be wrong for
    ever after a step that raised, since the hook after it never runs; the call stack is always right.
    """
    wrapper = sys._getframe(2)
    around = []
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and isinstance(optimizer := frame.f_locals.get("self"), Optimizer):
            around.append(optimizer)
        frame = frame.f_back
    return around


def forget_history(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    """Let an optimizer forget its past steps if it keeps them as vectors of all parameters, of which one changes size.

    That is LBFGS, which has them as the state of its first parameter, and counts the entries once.

    Args:
        optimizer: Any optimizer.
        parameter: The parameter that changes.
    """
    if isinstance(optimizer, torch.optim.LBFGS) and any(own is parameter for own in optimizer._params):
        optimizer.state.clear()
        optimizer._numel_cache = None


def watch_states(
    optimizer: Optimizer, saving: Callable[[Optimizer], None], loaded: Callable[[Optimizer], None]
) -> None:
    """Have functions called before an optimizer's state is read out, and after it was loaded.

    Wrappers (lookahead) may lack what torch's own constructor makes, and have the state read from the optimizer within.

    Args:
        optimizer: The optimizer.
        saving: Called before `state_dict()`.
        loaded: Called after `load_state_dict()`.
    """
    if hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
        optimizer.register_state_dict_pre_hook(saving)
        optimizer.register_load_state_dict_post_hook(loaded)


def pieces_of_zero(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """What of flat vectors belongs to the parameters that DeepSpeed's ZeRO, stage 1 or 2, steps in copies.

    Args:
        parameters: Some parameters.

    Returns:
        For each that ZeRO steps, its place in this process's vector; None where that is another process's.
    """
    mappings = [parameter._hp_mapping for parameter in parameters if hasattr(parameter, "_hp_mapping")]
    return [getattr(mapping, "hp_fragment", None) for mapping in mappings]


def in_pieces_of_zero(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter is empty between passes, since DeepSpeed's ZeRO, stage 3, has spread it over processes.

    DeepSpeed puts it together for the modules whose parameter it is, while they are called.
    """
    return parameter is not None and "ds_id" in parameter.__dict__  # three times as quick as `hasattr`


def gradient_scale(optimizer: Optimizer) -> torch.Tensor | float:
    """The factor that a gradient scaler gave the loss of the step that an optimizer is about to make.

    A `GradScaler` leaves its scale only with optimizers that unscale in their kernel. For all others it is known to
    the scaler alone, within whose `step` the optimizer steps.
    """
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:
        return cast(torch.Tensor, scale)
    frame = sys._getframe(1).f_back
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler):
            scale = getattr(scaler, "_scale", None)  # None, or missing where it is switched off
            return scaler.get_scale() if scale is None else cast(torch.Tensor, scale)
        frame = frame.f_back
    return 1.0


def offloading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Accelerate's hooks that load a module's weights for each call, from memory or disk, and let go of them again."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [
        hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload and hook.weights_map is not None
    ]


_clipping_watched = False


@contextmanager
def outside_trainers_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes in the data type of its weights, although a trainer has put it under autocast.

    Accelerate keeps the model's own forward beside the one under autocast, which it puts over it, and its public way
    back takes off decorators of the model's own as well. Weights in float16 stay under it, since adapters in float32
    may need that.
    """
    own, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if own is None or wrapped is None or next(model.parameters()).dtype == torch.float16:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def take_off_trainers_autocast(model: nn.Module) -> None:
    """Give a model back the forward that it had before a trainer put it under autocast."""
    own = model.__dict__.pop("_original_forward", None)
    if own is not None:
        model.forward = own


def watch_norm_clipping(told: Callable[[Sequence[torch.Tensor], float, float, torch.Tensor], None]) -> None:
    """Have a function told of every clipping of gradients by their norm; the first call counts, others do nothing.

    `torch.nn.utils.clip_grad_norm_` looks up the two functions that are wrapped here at every call, so that it does not
    matter where a loop or a trainer has it from.

    Args:
        told: Is given the gradients as they are after it, the norm that they were clipped to, which norm that is, and
            their norm before.
    """
    global _clipping_watched
    if _clipping_watched:
        return
    _clipping_watched = True
    module: Any = torch.nn.utils.clip_grad
    get_norm, clip = module._get_total_norm, module._clip_grads_with_norm_

    @functools.wraps(get_norm)
    def get_and_note(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm: Any = get_norm(tensors, norm_type, *args, **kwargs)
        norm._dynalora_norm_type = float(norm_type)
        return cast(torch.Tensor, norm)

    @functools.wraps(clip)
    def clip_and_tell(parameters: Any, max_norm: float, norm: Any, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        clip(parameters, max_norm, norm, *args, **kwargs)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        told(gradients, float(max_norm), getattr(norm, "_dynalora_norm_type", 2.0), whole)

    module._get_total_norm, module._clip_grads_with_norm_ = get_and_note, clip_and_tell


def total_norm(gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of gradients taken together, as `torch.nn.utils.clip_grad_norm_` computes it; a scalar."""
    norm: Any = torch.nn.utils.clip_grad._get_total_norm(gradients, norm_type)
    return cast(torch.Tensor, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def in_backward() -> bool:
    """Whether this code runs within a backward pass, as a forward pass repeated by gradient checkpointing does."""
    return bool(torch._C._current_graph_task_id() != -1)


def joins_uneven() -> bool:
    """Whether this code runs in a forward pass of DDP that makes up for processes with fewer batches (its `join()`)."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and active._join_config.enable


def version(tensor: torch.Tensor) -> int:
    """A number that changes whenever a tensor is written to; reading it waits for no device."""
    return tensor._version


def view_base(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that this one is a view of, as autograd sees it; the tensor itself if it is none."""
    return tensor._base if tensor._is_view() else tensor


def is_observed(module: nn.Module) -> bool:
    """Whether anybody else sees what a module returns, or its gradient: by hooks on the module or on all modules."""
    every = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anybody else sees a module's input or result in a forward pass: hooks on the module or on all modules."""
    every = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
    )


_linear_forward = nn.Linear.forward


def is_replaced(layer: nn.Linear) -> bool:
    """Whether calling a linear layer is more than its own forward: hooks before it, or another forward in its place."""
    return bool(
        layer._forward_pre_hooks
        or torch.nn.modules.module._global_forward_pre_hooks
        or "forward" in layer.__dict__  # as Accelerate puts it there, for weights that are elsewhere
        or nn.Linear.forward is not _linear_forward
    )


def transforming() -> bool:
    """Whether this code runs under a transform of torch.func, in forward-mode differentiation, or is being traced."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def inside_average() -> bool:
    """Whether this code runs within the making of a `torch.optim.swa_utils.AveragedModel`, which copies a model."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), AveragedModel):
            return True
        frame = frame.f_back
    return False
