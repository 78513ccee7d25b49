"""What to measure, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynalora.errors import ConfigError
from dynalora.evaluation.prompts import TEMPLATES
from dynalora.lab.precision import DTYPES, check_quantization


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Everything `dynalora evaluate` can be told.

    Attributes:
        source: A model or an adapter: a run folder, a folder, a Hub id, or `smollm2`, the demo's model.
        task: Names of tasks or groups, see [`benchmarks`][dynalora.evaluation.benchmarks].
        data: A folder with benchmark files, see [`sources`][dynalora.evaluation.sources]; None: the Hub.
        split: `train`, `dev` or `test`; None: test, or dev where there is no test.
        limit: The first items of each task only.
        model: The base model of an adapter; None: the one the adapter names.
        template: Prompts in the model's own format (`chat`) or a paper's, see [`prompts`][dynalora.evaluation.prompts].
        likelihood: For multiple choice, take the likeliest option instead of generating an answer.
        metric: Names of metrics to compute; empty: all of each task's.
        batch_size: Items per batch.
        max_new_tokens: Longest answer; None: each task's.
        window: Tokens per window, for perplexity.
        seed: Of generated tasks.
        run_code: Execute the code that the model writes (HumanEval, MBPP), in a sandbox.
        weak_sandbox: Execute it even where this system cannot contain it.
        code_seconds: Time limit of each generated program.
        shots: Examples before each question of lm-evaluation-harness's tasks; None: each task's own number.
        dtype: Of the model's weights.
        quantization: `4bit` (NF4), `8bit` or `int8` weights of the model (of an adapter's base), as in
            [`FinetuneSpec`][dynalora.jobs.finetune.settings.FinetuneSpec]; None: as they are.
        json: Also write everything measured to this file, which must not exist.

    Raises:
        ConfigError: A setting cannot work; the sentence names it.
    """

    source: str
    task: list[str]
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    model: str | None = None
    template: str = "chat"
    likelihood: bool = False
    metric: list[str] | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    window: int = 512
    seed: int = 0
    run_code: bool = False
    weak_sandbox: bool = False
    code_seconds: float = 5.0
    shots: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give 1 or more.")
        if self.template != "chat" and self.template not in TEMPLATES:
            raise ConfigError(f"template is '{self.template}'; choose one of chat, {', '.join(TEMPLATES)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is '{self.dtype}'; choose one of {', '.join(DTYPES)}.")
        check_quantization(self.quantization)
        if self.json is not None and Path(self.json).exists():
            raise ConfigError(f"'{self.json}' exists already; name another file with json (--json).")
