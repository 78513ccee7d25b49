"""Settings that several jobs share: the adapter; model, data and measuring; and a trained adapter to be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dynalora.lab.choices import DTYPES, MOST_RANK, PROMPTS, QUANTIZATIONS
from dynalora.lab.settings import SEED, Setting, Settings

if TYPE_CHECKING:
    from dynalora.evaluation.kinds.base import Measuring
    from dynalora.lab.tasks.task import ExperimentTask

MODEL_AND_DATA = "Model and data"
MEASURING = "Measuring"
RUN = "Run"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings, panel="Method"):
    """What adapters of all methods have.

    Attributes:
        r: Rank of the adapter; for `p-tuning` the number of virtual tokens.
        alpha: Numerator of the scale alpha / rank of the update; None: the method's default.
        dropout: Dropout on the adapter's input, from 0 up to, but without, 1.
        target_modules: Modules to adapt: names with commas, a regular expression, or all-linear.
    """

    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK)] = 16
    alpha: Annotated[float | None, Setting(above=0)] = None
    dropout: Annotated[float, Setting(least=0, below=1)] = 0.0
    target_modules: Annotated[list[str] | str, Setting("-t")] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(Settings):
    """Which trained adapter to use, and how to load its base model.

    Attributes:
        adapter: Run folder, adapter folder or Hub id of an adapter.
        model: Base model; None: the one the adapter names.
        dtype: Data type of the base model's weights; None: as the run had them, else auto.
        quantization: Hold the base weights in fewer bits; None: as the run had them.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN")]
    model: Annotated[str | None, Setting("-m", place=True)] = None
    dtype: Annotated[str | None, Setting(choices=DTYPES)] = None
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS))] = None


@dataclass(frozen=True, kw_only=True)
class LabSettings(Settings, panel=MODEL_AND_DATA):
    """Model, data and measuring.

    Attributes:
        model: Id of a causal language model on the Hugging Face Hub, a folder that holds one, or smollm2, the demo's.
        data: Folder with the files of benchmarks, as for `dynalora evaluate`; None: the Hub.
        held_out: Number of held-out questions per task. A file that has fewer gives all of its.
        train_limit: Number of training questions per task; None: all of a file, 1000 of a generated task.
        generated: Number of questions per task that are answered by generation where that must be, which is slow; 0:
            none.
        generated_tokens: Longest generated answer, in tokens.
        beams: Number of beams that answers are searched with, 4 in LLM-Adapters; 1: the likeliest token each time.
        max_length: Number of tokens, with the answer, above which training questions are left out.
        eval_batch_size: Number of questions per forward pass when measuring.
        system: System message of every question; None: what the model's chat template adds by itself.
        template: Format of the prompts: the model's own (chat), or a paper's. See
            [`prompts`][dynalora.evaluation.prompts].
        by_generation: Learn and answer multiple choice in words, scored by keywords as LLM-Adapters does, instead of
            comparing the options' likelihoods.
        run_code: Execute the code that the model writes (HumanEval, MBPP), in a sandbox.
        data_seed: Seed of generated questions, which does not change with the seeds of the runs.
        dtype: Data type of the base model's weights.
        threads: Number of threads that torch computes with; None: torch's choice.
    """

    model: Annotated[str, Setting("-m", place=True)] = "smollm2"
    data: Annotated[str | None, Setting(place=True)] = None
    held_out: Annotated[int, Setting(least=1, panel=MEASURING)] = 200
    train_limit: Annotated[int | None, Setting(least=1)] = None
    generated: Annotated[int, Setting(least=0, panel=MEASURING)] = 64
    generated_tokens: Annotated[int, Setting(least=1, panel=MEASURING)] = 256
    beams: Annotated[int, Setting(least=1, panel=MEASURING)] = 1
    max_length: Annotated[int, Setting(least=2)] = 256
    eval_batch_size: Annotated[int, Setting(least=1, panel=MEASURING)] = 8
    system: str | None = None
    template: Annotated[str, Setting(choices=PROMPTS)] = "chat"
    by_generation: Annotated[bool, Setting(negative="--by-likelihood", panel=MEASURING)] = False
    run_code: Annotated[bool, Setting(panel=MEASURING)] = False
    data_seed: Annotated[int, SEED] = 0
    dtype: Annotated[str, Setting(choices=DTYPES)] = "auto"
    threads: Annotated[int | None, Setting(least=1, panel=RUN)] = None

    @property
    def measuring(self) -> Measuring:
        """How tasks are measured."""
        from dynalora.evaluation.kinds.base import Measuring

        return Measuring(
            batch_size=self.eval_batch_size,
            generated=self.generated,
            generated_tokens=self.generated_tokens,
            beams=self.beams,
            system=self.system or "",
        )

    def load_task(self, source: str) -> ExperimentTask:
        """A task with as many questions as the settings say."""
        from dynalora.lab.tasks.loading import load_experiment_task

        return load_experiment_task(
            source,
            data=self.data,
            held_out=self.held_out,
            train_limit=self.train_limit,
            seed=self.data_seed,
            by_generation=self.by_generation,
            run_code=self.run_code,
        )
