"""What the package needs of PEFT, transformers and torch that they do not promise: one test each, with the reason."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer import DEFAULT_CALLBACKS

from dynalora.adapter.layer import AdapterLayer
from dynalora.adapter.model import AdapterModel
from dynalora.common import private
from dynalora.driver import losses
from tests.toys import TOYS

# Methods with an underscore that PEFT calls, or that we call, with PEFT's parameters after `self` or `cls`.
TUNER = {
    "_add_modules_to_save_to_tie": ["peft_config", "tied_weight_keys"],
    "_add_targets_to_tie": ["peft_config", "tied_weight_keys"],
    "_cast_adapter_dtype": ["adapter_name", "autocast_adapter_dtype"],
    "_check_merge_allowed": [],
    "_check_target_module_exists": ["peft_config", "key"],
    "_create_and_replace": [
        "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name",
    ],
    "_get_adapter_state_dict": None,
    "_get_learnable_bias_state_dict": ["model", "state_dict", "config"],
    # Of torch's modules, which call it for each module, parents first.
    "_load_from_state_dict": [
        "state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs",
    ],
    "_post_injection_hook": ["model", "config", "adapter_name"],
    "_prepare_adapter_config": ["peft_config", "model_config"],
    "_prepare_model": ["peft_config", "model"],
    "_remap_adapter_state_dict_for_load": ["model", "config", "adapter_name", "state_dict"],
    "_replace_module": ["parent", "child_name", "new_module", "child"],
    "_unload_and_optionally_merge": ["merge", "progressbar", "safe_merge", "adapter_names"],
}  # fmt: skip
LAYER = {"_cast_input_dtype": ["x", "dtype"], "_move_adapter_to_device_of_base_layer": ["adapter_name", "device"]}


@pytest.mark.parametrize(
    ("base", "name", "parameters"),
    [(BaseTuner, *item) for item in TUNER.items()] + [(BaseTunerLayer, *item) for item in LAYER.items()],
)
def test_peft_calls_what_we_override(base: type, name: str, parameters: list[str] | None) -> None:
    assert hasattr(base, name), f"PEFT's {base.__name__} has no {name} any more, so ours would never be called"
    names = [p for p in inspect.signature(getattr(base, name)).parameters if p not in ("self", "cls")]
    assert parameters is None or names == parameters, f"PEFT calls {name} with other parameters: {names}"


@pytest.mark.parametrize(
    ("ours", "base", "known"), [(AdapterModel, BaseTuner, TUNER), (AdapterLayer, BaseTunerLayer, LAYER)]
)
def test_no_override_is_forgotten_here(ours: type, base: type, known: dict[str, Any]) -> None:
    overridden = {
        name
        for kind in ours.__mro__
        if kind.__module__.startswith("dynalora.")
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and callable(getattr(base, name, None))
    }
    overridden -= {"_enable_peft_forward_hooks"}  # PEFT's base class has none
    assert overridden <= known.keys(), f"add {overridden - known.keys()} to this file"


def test_forward_passes_go_through_the_tuners_hooks() -> None:
    source = inspect.getsource(peft.PeftModel._enable_peft_forward_hooks)
    assert "self.base_model._enable_peft_forward_hooks(" in source, "adapter_names no longer reach AdapterModel"


def test_the_tuner_calls_its_hook_after_injection() -> None:
    seen = []

    class Tuner(AdapterModel):
        prefix = "dira_"

        def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
            seen.append("inject")

        def _post_injection_hook(self, *args: Any) -> None:
            seen.append("hook")

    Tuner(nn.Linear(2, 2), {"default": peft.LoraConfig()}, "default")
    assert seen == ["inject", "hook"], "BaseTuner calls _post_injection_hook no longer, or not after inject_adapter"


def test_lora_ties_modules_to_save_with_nothing_of_its_own() -> None:
    model = peft.get_peft_model(TOYS["llama"].build(), peft.LoraConfig(target_modules=["q_proj"]))
    config = peft.LoraConfig(modules_to_save=["lm_head"])
    private.tie_modules_to_save(model.base_model, config, ["lm_head"])  # type: ignore[arg-type]
    assert config.modules_to_save == ["model.embed_tokens"], "PEFT finds the embeddings in another way"
    assert config.modules_to_tie == {"lm_head"}, "set_additional_trainable_modules is told in another way"


@pytest.mark.parametrize("ignore", [False, True])
def test_loading_says_whether_it_leaves_out_what_does_not_fit(ignore: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    seen, remap = [], peft.LoraModel._remap_adapter_state_dict_for_load

    def remapped(**settings: Any) -> Any:
        seen.append(private.loads_what_fits())
        return remap(**settings)

    monkeypatch.setattr(peft.LoraModel, "_remap_adapter_state_dict_for_load", remapped)
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=ignore)
    assert seen == [ignore], "set_peft_model_state_dict calls its setting, or the tuner's hook, something else"
    assert not private.loads_what_fits()


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3)])
def test_features_of_linear_layers(inputs: int, outputs: int) -> None:
    assert private.features(nn.Linear(inputs, outputs)) == (inputs, outputs)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_convolution_takes_other_kernels_and_pads_as_it_does(mode: Any) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=(1, 2), dilation=(1, 2), stride=2, padding_mode=mode)
    x = torch.randn(2, 3, 8, 7)
    other = nn.Parameter(torch.randn(5, 3, 3, 3))
    bare = nn.Conv2d(3, 5, 3, dilation=(1, 2), stride=2, bias=False)
    bare.weight = other
    padded = private.padded_input(layer, x)
    torch.testing.assert_close(private.convolve(layer, x, other), bare(padded), msg="torch convolves in another way")


def test_all_linear_leaves_the_output_layer_out() -> None:
    model = TOYS["llama"].build()
    config = private.resolve_all_linear(peft.LoraConfig(target_modules="all-linear"), model)
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert config.target_modules == expected, "PEFT resolves all-linear elsewhere now, or in another way"


def test_buffer_dict_saves_what_it_holds() -> None:
    buffers = private.BufferDict(persistent=True)
    buffers["default"] = torch.ones(2)
    assert list(buffers.state_dict()) == ["default"], "BufferDict is to be part of checkpoints under the adapter's name"


def test_a_new_member_of_pefts_enumeration_is_like_its_own() -> None:
    code = """
from dynalora.common.private import peft_type
from peft.utils.peft_types import PeftType
member = peft_type("unheard_of")
assert member is PeftType("UNHEARD_OF") is PeftType["UNHEARD_OF"] is PeftType.UNHEARD_OF is peft_type("unheard_of")
assert member == "UNHEARD_OF" and member.value == "UNHEARD_OF" and member in list(PeftType), "not a full member"
import pickle
assert pickle.loads(pickle.dumps(member)) is member
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_peft_knows_is_left_to_it() -> None:
    code = """
import importlib.util
import warnings
from peft.utils import register_peft_method
from peft import LoraConfig, LoraModel
class Model(LoraModel):
    prefix = "disel_"
spec = importlib.util.spec_from_file_location("private", {path!r})
private = importlib.util.module_from_spec(spec)
spec.loader.exec_module(private)  # without importing dynalora
private.peft_type("disel")
register_peft_method(name="disel", config_cls=LoraConfig, model_cls=Model)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dynalora
(message,) = [str(w.message) for w in caught if "DiselConfig" in str(w.message)]
assert "'disel'" in message and "use a version of PEFT" in message, message
assert not hasattr(dynalora, "DiselConfig") and hasattr(dynalora, "DiraConfig")
names = dynalora.methods.method_names()
assert "disel" not in names and {"dira", "dislora", "pedyra"} <= set(names)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["DISEL"] is LoraConfig
"""
    subprocess.run([sys.executable, "-c", code.replace("{path!r}", repr(private.__file__))], check=True)


def test_model_cards_and_uploads_go_through_the_methods_that_are_wrapped() -> None:
    import transformers.utils.hub

    for name in ("create_or_update_model_card", "_upload_modified_files"):
        assert hasattr(peft.PeftModel, name), f"PeftModel has no {name} any more, so cards get no section"
        assert hasattr(getattr(peft.PeftModel, name), "__wrapped__"), f"{name} is not extended by `import dynalora`"
    called = inspect.getsource(peft.PeftModel.save_pretrained)
    assert "self.create_or_update_model_card(" in called, "save_pretrained writes its card by another way"
    called = inspect.getsource(transformers.utils.hub.PushToHubMixin.push_to_hub)
    assert "self._upload_modified_files(" in called, "push_to_hub uploads by another way"


def test_default_callbacks_reach_every_trainer() -> None:
    class Callback(TrainerCallback):
        pass

    private.add_default_callback(Callback)
    private.add_default_callback(Callback)
    assert DEFAULT_CALLBACKS.count(Callback) == 1  # type: ignore[arg-type]
    DEFAULT_CALLBACKS.remove(Callback)  # type: ignore[arg-type]


def test_transformers_loads_adapters_by_one_function() -> None:
    names = [*inspect.signature(PeftAdapterMixin.load_adapter).parameters][:3]
    assert names == ["self", "peft_model_id", "adapter_name"], "transformers' load_adapter has other parameters now"
    assert hasattr(PeftAdapterMixin.load_adapter, "extended_by_dynalora")
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    assert "load_adapter(" in source, "from_pretrained loads adapters by another way"


def test_steps_around_sees_the_optimizer_that_steps_another() -> None:
    parameter = nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([parameter], lr=0.1)
    seen: list[list[torch.optim.Optimizer]] = []

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            inner.step()

    outer = Outer([parameter], lr=0.1)
    handle = inner.register_step_pre_hook(lambda *_: seen.append(private.steps_around()))
    try:
        outer.step()
        inner.step()
    finally:
        handle.remove()
    assert seen == [[outer], []], "torch wraps Optimizer.step otherwise, so nested steps cannot be told apart"


def test_lbfgs_keeps_its_history_where_it_is_forgotten() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([parameter], max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    private.forget_history(optimizer, nn.Parameter(torch.ones(2)))
    assert optimizer.state
    private.forget_history(optimizer, parameter)
    parameter.data, parameter.grad = torch.ones(3), None
    optimizer.step(closure)
    assert parameter.grad is not None, "LBFGS keeps what it counted elsewhere"


def test_states_are_watched_where_torchs_constructor_ran() -> None:
    parameter = nn.Parameter(torch.ones(1))
    seen: list[str] = []

    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            """As lookahead's wrappers do, without torch's."""

    for optimizer in (torch.optim.SGD([parameter]), Wrapper()):
        private.watch_states(optimizer, lambda _: seen.append("saving"), lambda _: seen.append("loaded"))
    plain = torch.optim.SGD([parameter])
    private.watch_states(plain, lambda _: seen.append("saving"), lambda _: seen.append("loaded"))
    plain.load_state_dict(plain.state_dict())
    assert seen == ["saving", "loaded"], "torch calls the hooks of an optimizer's state otherwise"


def test_gradient_scale_is_that_of_the_scaler_that_steps() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(private.gradient_scale(optimizer))))
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    optimizer.step()
    assert seen == [8.0, 1.0], "GradScaler.step steps the optimizer otherwise, or keeps its scale elsewhere"


def test_a_backward_pass_knows_itself() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda _: seen.append(private.in_backward()))
    assert not private.in_backward()
    y.backward()
    assert seen == [True], "autograd no longer says which graph runs, so checkpointed inputs would count twice"


def test_a_forward_pass_knows_whether_ddp_makes_up_for_missing_batches(tmp_path: Path) -> None:
    class Asks(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            said.append(private.joins_uneven())
            return super().forward(x)

    said: list[bool] = []
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        called = torch.nn.parallel.DistributedDataParallel(Asks(2, 2))
        called(torch.ones(1, 2))
        with called.join():
            called(torch.ones(1, 2)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert said == [False, True], "DDP no longer says which module runs, or whether it is within join()"
    assert not private.joins_uneven()


def test_every_backward_goes_through_the_function_that_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first watchers of a process stay, so these are put in their place for this test only.
    monkeypatch.setattr(losses, "_watching", False)
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    seen: list[float] = []
    losses.watch_backward(lambda: None, lambda loss, noted, alone: seen.append(float(loss)))
    (2 * torch.ones(1, requires_grad=True)).sum().backward()
    assert seen == [2.0]
    source = inspect.getsource(torch.Tensor.backward)
    assert "torch.autograd.backward(" in source, "Tensor.backward no longer calls torch.autograd.backward by its name"


def test_clipping_goes_through_the_functions_that_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = torch.nn.utils.clip_grad
    # The first watchers of a process stay, so these are put in their place for this test only.
    monkeypatch.setattr(private, "_clipping_watched", False)
    for name in ("_get_total_norm", "_clip_grads_with_norm_"):
        assert hasattr(module, name), f"torch has no {name} any more, so clip_penalty would do nothing"
        monkeypatch.setattr(module, name, getattr(module, name))
    seen: list[Any] = []
    private.watch_norm_clipping(lambda *told: seen.append(told))
    parameter = torch.nn.Parameter(torch.ones(2))
    (2 * parameter).sum().backward()
    torch.nn.utils.clip_grad_norm_(parameter, 1.0, norm_type=1.0)
    [(gradients, max_norm, norm_type, norm)] = seen
    assert (max_norm, norm_type, float(norm)) == (1.0, 1.0, 4.0)
    assert gradients[0] is parameter.grad
    assert float(private.total_norm([torch.full((2,), 3.0)], 1.0)) == 6.0


def test_versions_change_with_every_write() -> None:
    tensor = torch.ones(2)
    before = private.version(tensor)
    tensor.add_(1)
    assert private.version(tensor) > before
    assert private.version(tensor) == private.version(tensor)


def test_view_base_and_hooks() -> None:
    whole = torch.ones(4)
    assert private.view_base(whole) is whole
    assert private.view_base(whole[:2]) is whole
    layer = nn.Linear(2, 2)
    assert not private.is_observed(layer)
    every = torch.nn.modules.module
    for register in (
        layer.register_forward_hook,
        layer.register_full_backward_hook,
        layer.register_full_backward_pre_hook,
        every.register_module_forward_hook,
        every.register_module_full_backward_hook,
        every.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert private.is_observed(layer), register
        assert private.has_forward_hooks(layer) == ("forward" in register.__name__), register
        handle.remove()
        assert not private.is_observed(layer)
    for register in (layer.register_forward_pre_hook, every.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert private.has_forward_hooks(layer), register
        handle.remove()
        assert not private.has_forward_hooks(layer)


def test_transforms_and_tracers_are_noticed() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.transforming())
        return x.sum()

    x = torch.ones(2)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[None])
    torch.func.jvp(function, (x,), (x,))
    torch.jit.trace(function, x, check_trace=False)
    function(x)
    assert seen == [False, True, True, True, True, False]


def test_an_average_of_a_model_is_noticed_while_it_copies() -> None:
    seen = []

    class Noting(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            seen.append(private.inside_average())
            return nn.Linear(2, 2)

    copy.deepcopy(Noting(2, 2))
    torch.optim.swa_utils.AveragedModel(Noting(2, 2))
    assert seen == [False, True]


def test_operations_on_lists_of_tensors() -> None:
    a, b = [torch.tensor([-2.0])], [torch.tensor([3.0])]
    product = private.foreach_mul(a, b)
    private.foreach_abs_(product)
    private.foreach_div_(product, 2.0)
    private.foreach_sub_(product, a)
    private.foreach_lerp_(product, b, 0.5)
    private.foreach_add_(product, b)
    assert [float(x) for x in product] == [(5 + 3) / 2 + 3]


def test_layers_without_their_updates_compute_what_their_base_layers_do() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    (layer,) = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    x = torch.ones(1, 2)
    adapted, trains = model(x), [parameter.requires_grad for parameter in model.parameters()]
    with private.without_updates([layer]):
        base = model(x)
        assert [parameter.requires_grad for parameter in model.parameters()] == trains
    reason = "PEFT's layers no longer ask _disable_adapters whether to add their update"
    assert torch.equal(base, layer.get_base_layer()(x)), reason
    assert torch.equal(model(x), adapted)
    assert not torch.equal(base, adapted)


def test_a_model_says_whether_its_adapters_are_off() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    assert not private.adapters_disabled(model)
    with model.disable_adapter():
        assert private.adapters_disabled(model), "disable_adapter no longer sets _adapters_disabled"
    assert not private.adapters_disabled(model)


def test_a_failed_load_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*inspect.signature(peft.PeftModel.load_adapter).parameters][:3]
    assert names == ["self", "model_id", "adapter_name"], "PEFT's load_adapter has other parameters now"

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("score.weight")

    seen: list[str] = []

    def told(model: Any, adapter: str, folder: str, error: Exception) -> Exception:
        seen.extend([adapter, folder])
        return ValueError("told")

    monkeypatch.setattr(peft.PeftModel, "load_adapter", fail)
    private.after_failed_load(told)
    private.after_failed_load(told)  # changes nothing
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="told"):
        model.load_adapter("nowhere", "other")
    assert seen == ["other", os.path.join("nowhere", "")]


def test_an_unread_method_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = peft.PeftConfig._get_peft_type
    monkeypatch.setattr(PeftConfigMixin, "_get_peft_type", classmethod(inspect.unwrap(reader.__func__)))
    seen: list[str] = []
    private.after_unread_method(seen.append)
    private.after_unread_method(seen.append)  # changes nothing
    inner = tmp_path / "inner"
    inner.mkdir()
    for text in ("{", '{"r": 1}', '{"peft_type": "X"}', '{"peft_type": []}'):
        (inner / "adapter_config.json").write_text(text)
        with pytest.raises((ValueError, KeyError, TypeError)):
            peft.PeftModel.from_pretrained(nn.Linear(2, 2), str(tmp_path), subfolder="inner")
    assert seen == [str(inner)] * 4, "PEFT reads an adapter's method in another place now"
    (inner / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert peft.PeftConfig._get_peft_type(str(inner)) == "LORA"
    assert len(seen) == 4


def test_a_trainers_autocast_can_be_taken_off() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.computed: list[torch.dtype] = []

        @torch.no_grad()  # a decorator of its own, which has to stay
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = self.linear(x)
            self.computed.append(result.dtype)
            return result

    model, x = Model(), torch.ones(1, 4)
    AcceleratorState._reset_state(True)  # another test's trainer may have chosen another precision for the process
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    model(x)
    with private.outside_trainers_autocast(model):
        model(x)
    model(x)
    private.take_off_trainers_autocast(model)
    AcceleratorState._reset_state(True)
    assert not model(x).requires_grad
    assert model.computed == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32], (
        "Accelerate puts a model under autocast in another way, so KL would be measured with bfloat16's rounding."
    )


def test_accelerate_says_where_it_keeps_weights_that_it_loads_for_each_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight.detach().clone()
    assert private.offloading_hooks(model[0]) == []
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    (hook,) = private.offloading_hooks(model[0])
    assert torch.device(hook.execution_device) == torch.device("cpu")
    assert hook.weights_map is not None
    assert torch.equal(hook.weights_map["weight"], weight)
