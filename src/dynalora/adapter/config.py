"""The settings that all methods share."""

from __future__ import annotations

import copy
import os
import re
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType
from typing_extensions import Self

from dynalora.adapter.patterns import MOST_NAMES, compiles, too_many
from dynalora.adapter.saved import check_adapter_folder
from dynalora.common.names import did_you_mean, shown
from dynalora.errors import CheckpointError, ConfigError, DynaloraError, UnknownSettingError, first_line

if TYPE_CHECKING:
    from dynalora.adapter.layer import AdapterLayer

RetainMode = Literal["quadratic", "replay"]

_MOST_RANK = 65536  # more than any layer is wide
_MOST_ALPHA = 1e9
_RANK = f"a positive integer of at most {_MOST_RANK}"
_ALPHA = f"a positive number of at most {_MOST_ALPHA:g}"

# What PEFT's LoraConfig and AdaLoraConfig call settings that have another name here.
_OF_PEFT = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init_weights",
    "total_step": "total_steps",
    "orth_reg_weight": "ortho_weight",
}
# Settings of LoraConfig that there are not, because the same is had in another way.
_INSTEAD_OF_PEFT = {
    "fan_in_fan_out": "how a weight lies is read off its layer; leave it out",
    "target_parameters": "name experts in target_modules, as other layers",
    "layer_replication": "replicate the blocks first, with peft.tuners.tuners_utils.replicate_layers(model, ...)",
}


@dataclass
class AdapterConfig(PeftConfig):
    """Settings common to all methods; each method's configuration adds its own.

    Args:
        r: Rank of the adapter, the largest a matrix can get where a method learns ranks.
        alpha: Scaling numerator: the update is scaled by `s = alpha / r` (`alpha / √r` with `use_rslora`). None
            takes the method's default multiple of `r`.
        dropout: Probability of dropping entries of the adapter's input during training, in [0, 1).
        use_rslora: Scale by `alpha / √r` (Kalajdzievski, 2023).
        target_modules: Names (suffixes) of the linear layers to adapt, a regular expression, or `"all-linear"`; None
            takes PEFT's choice for the architecture.
        exclude_modules: Names, or a regular expression, of modules to leave out.
        rank_pattern: Ranks that differ from `r`: module name or regular expression → rank.
        alpha_pattern: Alphas that differ from `alpha`, likewise.
        scaling_ranks: Written by training that has moved ranks: the rank that a matrix's scaling still refers to, by
            module name, where that is not its own.
        layer_kinds: Written where convolutions or embeddings are adapted: what they are, by module name.
        layers_to_transform: Indices of the transformer blocks to adapt; None adapts all.
        layers_pattern: Name of the `nn.ModuleList` of blocks, needed for uncommon architectures together with
            `layers_to_transform`.
        modules_to_save: Further modules to train in full and save with the adapter (a new classifier head, say).
        trainable_token_indices: New or rare words to train besides: ids of tokens of the input embeddings, or ids by
            the name of an embedding. Only their rows are trained and saved; a head that is tied to it follows.
        ensure_weight_tying: Keep the input embeddings and a head that is tied to them one weight: with one of them in
            `modules_to_save` both are the same trained weight, and `trainable_token_indices` that differ are refused.
            Adapters of the two cannot be tied, and are refused.
        bias: Which base biases to train: `"none"`, `"all"`, or `"<method>_only"`, those of the adapted layers.
        init_weights: True starts as the base model. False gives the update random non-zero factors, for tests.
        total_steps: Optimizer steps of the run, for methods with a schedule. Not needed under transformers' Trainer,
            which tells it; if given, it counts.
        retain: Weight of a penalty that keeps what the base model says on text that it wrote itself
            ([`adapter.retain`][dynalora.adapter.retain]); 300 to 3000 keeps much and learns as well. None leaves it
            out. Needs a causal language model, and its tokenizer before the first step (`dynalora.prepare_retain`).
        clip_penalty: Clip gradients with what the method, or `retain`, adds to them, as if it were part of the loss.
            False adds penalties after a loop or a trainer has clipped the task's gradients.
        max_forgetting: KL(base ‖ tuned) in nats per token, on the text that `retain` keeps, at which the run is to end.
            The weight of the penalty is then `retain` at most and falls where measurements find less forgotten; what is
            above at the end is scaled down ([`adapter.budget`][dynalora.adapter.budget]). None keeps the weight.
        retain_mode: `"quadratic"`, the penalty in closed form; or `"replay"`, the KL itself on four of the texts at
            every step, which costs a forward and a backward pass over them.
        retain_on: What to keep instead of text that the base model writes: a `.txt` file (texts between blank lines),
            a data file with a field `text`, or a list of texts. Not written into the saved configuration.

    Raises:
        ConfigError: A value that cannot work; the message names the field, the value and the remedy.
    """

    r: int = field(default=8, metadata={"help": "Give the adapter this rank."})
    alpha: float | None = field(
        default=None, metadata={"help": "Multiply the update by alpha / r; None: the method's default multiple of r."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Set this part of the adapter's inputs to 0 during training."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Multiply the update by alpha / sqrt(r) instead of alpha / r."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Adapt these layers: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Leave these modules out: names, or a regular expression."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Give some modules another rank than r, by their names or regular expressions."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Give some modules another alpha, by their names or regular expressions."},
    )
    scaling_ranks: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Leave this to training, which writes here the ranks that the scaling refers to after ranks have "
            "moved."
        },
    )
    layer_kinds: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Leave this to saving, which writes here what adapted convolutions and embeddings are."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the blocks with these indices; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Say what the model calls its list of blocks, which `layers_to_transform` counts."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Train these further modules in full, and save them with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Train the embeddings of the tokens with these ids, or with these ids by the embedding's name."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep embeddings and a head that is tied to them one weight, where they train in full."},
    )
    bias: str = field(
        default="none",
        metadata={
            "help": "Train biases of the base model, too: none, all, or those of adapted layers (<method>_only)."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start as the base model (True), or with a random update, which is for tests (False)."},
    )
    total_steps: int | None = field(
        default=None,
        metadata={
            "help": "Say how many optimizer steps the run has. Under transformers' Trainer it is found by itself."
        },
    )
    clip_penalty: bool = field(
        default=False,
        metadata={"help": "Clip gradients together with the method's penalty, as if it were part of the loss."},
    )
    retain: float | None = field(
        default=None,
        metadata={
            "help": "Weigh the penalty on forgetting, which keeps what the base model says on its own text, with "
            "this number."
        },
    )
    max_forgetting: float | None = field(
        default=None,
        metadata={
            "help": "End the run at this KL from the base model, in nats per token. The weight of `retain` is then the "
            "largest, and falls where less is forgotten."
        },
    )
    retain_mode: RetainMode = field(
        default="quadratic",
        metadata={
            "help": "Keep the base model by a closed form (quadratic), or by the KL itself at every step (replay)."
        },
    )
    retain_on: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Keep what the base model says on this text, a .txt or .jsonl file or texts; None: on its own text."
        },
    )

    #: Name of the method, set by each method's configuration.
    method: ClassVar[str] = ""
    #: ``alpha`` as a multiple of ``r`` where the user gives none.
    default_alpha_per_rank: ClassVar[float] = 1.0
    #: Fields that changed what a method does when they came, with what configurations from before meant.
    before: ClassVar[Mapping[str, Any]] = {}

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Refuse settings that there are not, with the name that they have here.

        Raises:
            UnknownSettingError: There is no such setting.
        """
        known = {setting.name for setting in fields(cls)}
        for name in given:
            if name not in known:
                # PEFT knows the first words, and leaves such settings out of the files of newer versions.
                raise UnknownSettingError(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}: {cls._instead_of(name, known)}."
                )
        return super().__new__(cls)

    @classmethod
    def _instead_of(cls, name: str, known: Collection[str]) -> str:
        """What to do instead of giving a setting that there is not."""
        if (here := _OF_PEFT.get(name)) in known:
            return f"it is called {here!r} here"
        if name in _INSTEAD_OF_PEFT:
            return _INSTEAD_OF_PEFT[name]
        if name in {setting.name for setting in fields(LoraConfig)}:
            return "it is a setting of PEFT's LoRA that this method does not have; leave it out"
        return did_you_mean(name, known, brief=True)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:  # an unknown task
            given = shown(self.task_type)
            raise ConfigError(f"{type(self).__name__}: task_type={given}: {first_line(error)}.") from None
        # What PEFT writes into the configuration of every saved adapter: weights may follow, so that computing how the
        # adapter starts is put off until it is used without them. Loading for training unsets the setting.
        self.may_be_loaded = self.inference_mode
        # Layers whose ranks are saved with the configuration, and their adapter; see `follow`.
        self._followed: tuple[Sequence[weakref.ref[AdapterLayer]], str] = ((), "")
        if self.method:
            self.peft_type = PeftType[self.method.upper()]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                setattr(self, name, set(value))
        self._require(_is_count(self.r), "r", "a positive integer")
        self._require(_is_rank(self.r), "r", _RANK)
        if self.alpha is None:
            self.alpha = self.default_alpha_per_rank * self.r
        self._require(is_number(self.alpha) and self.alpha > 0, "alpha", "a positive number, or left out")
        self._require(_is_alpha(self.alpha), "alpha", _ALPHA)
        self._require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._check_patterns()
        self._require(
            _are_tokens(self.trainable_token_indices),
            "trainable_token_indices",
            "a list of different token numbers, or such lists by the names of embeddings",
        )
        self._require(
            not isinstance(self.trainable_token_indices, dict) or len(self.trainable_token_indices) <= MOST_NAMES,
            "trainable_token_indices",
            f"at most {MOST_NAMES} embeddings with their tokens",
        )
        for item in fields(self):
            if item.type in ("bool", bool):
                self._require(isinstance(getattr(self, item.name), bool), item.name, "True or False")
        biases = ("none", "all", f"{self.method}_only")
        self._require(self.bias in biases, "bias", f"one of {', '.join(map(repr, biases))}")
        if self.total_steps is not None:
            self._require(_is_count(self.total_steps), "total_steps", "a positive integer, or left out")
        if self.retain is not None:
            self._require(
                is_number(self.retain) and self.retain > 0, "retain", "a positive number, or None to leave it out"
            )
        self._check_retain()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            # "all-linear" included, as in PEFT: a pattern already says which layers it means.
            raise ConfigError(
                f"{type(self).__name__}: layers_to_transform cannot be used when target_modules is the string "
                f"{self.target_modules!r}; list the module names, or put the layer numbers into the regular expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"{type(self).__name__}: layers_pattern={self.layers_pattern!r} needs layers_to_transform, the indices "
                "of the blocks to adapt."
            )

    def _check_patterns(self) -> None:
        """Check what chooses modules and what differs among them."""
        kinds = (
            ("rank_pattern", _is_rank, _RANK),
            ("alpha_pattern", _is_alpha, _ALPHA),
            ("scaling_ranks", _is_rank, _RANK),
        )
        for name, valid, expected in kinds:
            pattern = getattr(self, name)
            if pattern is None:
                pattern = {}
                setattr(self, name, pattern)
            self._require(isinstance(pattern, dict), name, "a mapping from names or regular expressions")
            self._require(
                not too_many(key for key in pattern if isinstance(key, str)),
                name,
                "keyed by names, or by 10,000 regular expressions of 300,000 characters together at most",
            )
            for key, value in pattern.items():
                self._require(
                    isinstance(key, str) and compiles(key),
                    name,
                    "keyed by regular expressions of 100,000 characters at most",
                    key,
                )
                self._require(valid(value), f"{name}[{key!r}]", expected, value)
        described: Any = self.layer_kinds or {}
        mapped = isinstance(described, dict) and all(isinstance(layer, dict) for layer in described.values())
        self._require(mapped, "layer_kinds", "what saving wrote, or left out")
        self.layer_kinds = described
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            named = isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
            self._require(value is None or isinstance(value, str) or named, name, "a name or a list of names")
            keys = value or () if name in ("layers_pattern", "modules_to_save") else ()  # PEFT matches each of these
            self._require(len(keys) <= MOST_NAMES or isinstance(value, str), name, f"at most {MOST_NAMES} names")
            for key in [value] if isinstance(value, str) else keys:
                self._require(compiles(key), name, "a regular expression of 100,000 characters at most", key)
        blocks = self.layers_to_transform
        listed = list(blocks) if isinstance(blocks, (list, tuple, range)) else [blocks]
        whole = all(map(is_whole, listed))
        self._require(blocks is None or whole, "layers_to_transform", "an index or a list of indices")

    def _check_retain(self) -> None:
        self._require(self.retain_mode in get_args(RetainMode), "retain_mode", "'quadratic' or 'replay'")
        if self.max_forgetting is not None:
            self._require(
                is_number(self.max_forgetting) and self.max_forgetting > 0,
                "max_forgetting",
                "a positive number of nats per token, or None",
            )
            if self.retain is None:
                raise ConfigError(
                    f"{type(self).__name__}: max_forgetting={self.max_forgetting:g} needs retain, whose weight it "
                    "controls; give retain=1000.0 too, or bound a run without it with "
                    "RetentionMonitor(max_forgetting=...) or dynalora.trim(model, text, max_kl=...)."
                )
        if self.retain_on is not None:
            texts = [self.retain_on] if isinstance(self.retain_on, str) else self.retain_on
            listed = isinstance(texts, (list, tuple)) and bool(texts)
            self._require(
                listed and all(isinstance(text, str) for text in texts), "retain_on", "a file or a list of texts"
            )
            self._require(self.retain is not None, "retain_on", "left out unless retain has a weight")

    def _require(self, holds: bool, name: str, expected: str, value: Any = MISSING) -> None:
        """Raise a `ConfigError` that names field, value and remedy unless `holds`."""
        if not holds:
            actual = getattr(self, name) if value is MISSING else value
            raise ConfigError(f"{type(self).__name__}: {name} must be {expected}, got {shown(actual)}.")

    @property
    def gated(self) -> bool:
        """Whether the adapter has gates per token, so that its update depends on the input."""
        return False

    @property
    def own_rates(self) -> bool:
        """Whether gates, or steps of `up` that follow the diagonal, have learning rates of their own."""
        return False

    def combined(self, **settings: Any) -> Self:
        """The configuration of an adapter that is made of several, of which this one's is the first.

        Args:
            **settings: What differs: its rank, scaling and target modules.
        """
        return replace(self, **settings)

    def at_largest(self) -> AdapterConfig:
        """The configuration whose adapter begins as large as this one's may become, by which sizes are matched."""
        return self

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor `s` in front of an update of the given rank."""
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def describe(self, layers: Iterable[AdapterLayer], adapter: str) -> dict[str, Any]:
        """The settings that differ where the weights of a trained adapter are saved, and not only its configuration.

        Args:
            layers: The layers of the adapter.
            adapter: Its name.

        Returns:
            Ranks and the ranks that the scaling refers to, if training has moved any; what layers are that are not
            linear; and a start that needs no decomposition of the base weights, since the weights are there.
        """
        layers = list(layers)

        def pattern(ranks: Sequence[int], usual: Sequence[int]) -> dict[str, int]:
            # PEFT reads the keys as regular expressions for the end of a module's name.
            rows = zip(layers, ranks, usual, strict=True)
            return {f"^{re.escape(layer.name)}": rank for layer, rank, other in rows if rank != other}

        ranks = [layer.rank(adapter) for layer in layers]
        scaling_ranks = [layer.scaling_ranks[adapter] for layer in layers]
        settings: dict[str, Any] = {}
        if ranks != scaling_ranks:
            settings["rank_pattern"] = pattern(ranks, [self.r] * len(ranks))
            settings["scaling_ranks"] = pattern(scaling_ranks, ranks)
        if kinds := {layer.name: layer.layer_kind.described() for layer in layers if layer.layer_kind is not None}:
            settings["layer_kinds"] = kinds
        start: Any = self.init_weights  # some methods name theirs
        if isinstance(start, str):
            settings["init_weights"] = True
        return settings

    def follow(self, layers: Iterable[AdapterLayer], adapter: str) -> None:
        """Take the ranks that `save_pretrained` writes from these layers, whose weights are being saved.

        The configuration itself stays as the user made it: one object may serve several models.

        Args:
            layers: The layers of an adapter with this configuration.
            adapter: Its name.
        """
        self._followed = [weakref.ref(layer) for layer in layers], adapter

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, with the ranks of the adapter whose weights were last read to be saved."""
        references, adapter = self._followed
        layers = [layer for reference in references if (layer := reference()) is not None]
        written = copy.copy(self)
        for name, value in self.describe(layers, adapter).items() if layers else ():
            setattr(written, name, value)
        written.retain_on = None  # the user's texts, or a place on this machine
        super(AdapterConfig, written).save_pretrained(save_directory, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_followed": ((), "")}  # which is no setting, and means nothing to a copy

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the settings a user may give, PEFT's bookkeeping left out."""
        bookkeeping = {f.name for f in fields(PeftConfig)}
        return [f.name for f in fields(cls) if f.name not in bookkeeping]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """Load the configuration of a saved adapter; a local folder is first checked for damage.

        Raises:
            CheckpointError: The folder's files are damaged or do not belong together, or the adapter was made by
                another method.
            ConfigError: A setting has a value that cannot work.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder):
            check_adapter_folder(folder, cls.method)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)  # type: ignore[no-any-return]
        except DynaloraError:
            raise
        except (TypeError, AttributeError, KeyError, OverflowError) as error:  # values of other kinds than meant
            raise CheckpointError(
                f"the configuration in {folder} cannot be used ({first_line(error)}); restore it from another copy of "
                "the adapter."
            ) from error


def _is_count(value: Any) -> bool:
    # Counts of steps are kept as int64 with the adapter.
    return is_whole(value) and 0 < value < 2**53


def _are_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    numbered = all(
        isinstance(tokens, (list, tuple))
        and all(is_whole(token) and 0 <= token < 2**31 for token in tokens)
        and len(set(tokens)) == len(tokens)
        for tokens in lists
    )
    return numbered and all(isinstance(name, str) for name in (value if isinstance(value, dict) else ()))


def _is_rank(value: Any) -> bool:
    return _is_count(value) and value <= _MOST_RANK


def _is_alpha(value: Any) -> bool:
    return is_number(value) and 0 < value <= _MOST_ALPHA


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which True and False are not."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
