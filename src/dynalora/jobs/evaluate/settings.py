"""Settings of `dynalora evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dynalora.lab.choices import DTYPES, PROMPTS, QUANTIZATIONS
from dynalora.lab.settings import SEED, Setting, Settings


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(Settings):
    """What to measure, and on what.

    Attributes:
        source: Measure this model or adapter: a run folder, a folder, an id on the Hugging Face Hub, or smollm2, the
            demo's model.
        task: Measure on these tasks or groups of tasks, with commas or given again. See
            [`benchmarks`][dynalora.evaluation.benchmarks].
        data: Read the benchmarks' files from this folder; None: the Hub. See [`sources`][dynalora.evaluation.sources].
        split: Take this split of the tasks: train, dev or test; None: test, or dev where there is no test.
        limit: Use only this many items of each task, from the first; None: all.
        model: Use this base model of an adapter; None: the one the adapter names.
        template: Write prompts in this format: the model's own (chat), or a paper's. See
            [`prompts`][dynalora.evaluation.prompts].
        likelihood: Take the likeliest option of multiple choice, instead of generating an answer.
        metric: Compute these metrics, with commas or given again; None: all of each task's.
        batch_size: Process this many items at once. A smaller number takes less memory.
        max_new_tokens: Break an answer off after this many tokens; None: each task's.
        beams: Search answers with this many beams; 1: the likeliest token each time.
        window: Cut text into windows of this many tokens, for perplexity.
        seed: Draw generated tasks from this seed.
        run_code: Execute the code that the model writes (HumanEval, MBPP), in a sandbox.
        weak_sandbox: Execute generated code even on a system that cannot contain it in a sandbox.
        code_seconds: Stop each generated program after so many seconds.
        shots: Show this many examples before each question of lm-evaluation-harness's tasks; None: each task's own
            number.
        max_length: Cut the input of lm-evaluation-harness's tasks to this many tokens; None: what the model takes.
        dtype: Load the model's weights with this data type.
        quantization: Hold the weights (of an adapter's base model) in fewer bits: 4bit (NF4) or 8bit with bitsandbytes,
            int8 with torchao; None: as they are.
        json: Write everything that was measured into this file, which must not exist.

    """

    source: Annotated[str, Setting(positional=True, metavar="MODEL_OR_ADAPTER", home=True)]
    task: Annotated[list[str], Setting("-t", commas=True)]
    data: Annotated[str | None, Setting("-d", home=True)] = None
    split: str | None = None
    limit: Annotated[int | None, Setting("-n", least=1)] = None
    model: Annotated[str | None, Setting("-m", home=True)] = None
    template: Annotated[str, Setting(choices=PROMPTS)] = "chat"
    likelihood: bool = False
    metric: Annotated[list[str] | None, Setting(commas=True)] = None
    batch_size: Annotated[int, Setting("-b", least=1)] = 16
    max_new_tokens: Annotated[int | None, Setting(least=1)] = None
    beams: Annotated[int, Setting(least=1)] = 1
    window: Annotated[int, Setting(least=2)] = 512
    seed: Annotated[int, SEED] = 0
    run_code: bool = False
    weak_sandbox: bool = False
    code_seconds: Annotated[float, Setting(above=0)] = 5.0
    shots: Annotated[int | None, Setting(least=0)] = None
    max_length: Annotated[int | None, Setting(least=1)] = None
    dtype: Annotated[str, Setting(choices=DTYPES)] = "auto"
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS))] = None
    json: Annotated[str | None, Setting(metavar="FILE.json", recorded=False, writes="file")] = None
