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
        r: Give the adapter this rank; for `p-tuning` it is the number of virtual tokens. A higher rank can learn more,
            and takes more memory.
        alpha: Multiply the update by alpha / rank; None: the method's default.
        dropout: Set this part of the adapter's inputs to 0 while training, from 0 up to, but without, 1.
        target_modules: Adapt these modules: names with commas, a regular expression, or all-linear.
    """

    r: Annotated[int, Setting("-r", name="--rank", least=1, most=MOST_RANK)] = 16
    alpha: Annotated[float | None, Setting(above=0)] = None
    dropout: Annotated[float, Setting(least=0, below=1)] = 0.0
    target_modules: Annotated[list[str] | str, Setting("-t")] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(Settings):
    """Which trained adapter to use, and how to load its base model.

    Attributes:
        adapter: Use this adapter: a run folder, an adapter folder, or an id on the Hugging Face Hub.
        model: Use this base model; None: the one the adapter names.
        dtype: Load the base model's weights with this data type; None: as the run had them, else auto.
        quantization: Hold the base weights in fewer bits; None: as the run had them.
    """

    adapter: Annotated[str, Setting(positional=True, metavar="RUN", home=True)]
    model: Annotated[str | None, Setting("-m", place=True)] = None
    dtype: Annotated[str | None, Setting(choices=DTYPES)] = None
    quantization: Annotated[str | None, Setting(choices=tuple(QUANTIZATIONS))] = None


@dataclass(frozen=True, kw_only=True)
class LabSettings(Settings, panel=MODEL_AND_DATA):
    """Model, data and measuring.

    Attributes:
        model: Train this causal language model: its id on the Hugging Face Hub, a folder that holds one, or smollm2,
            the demo's.
        data: Read the benchmarks' files from this folder, as `dynalora evaluate` does; None: the Hub.
        held_out: Measure on this many held-out questions per task. A file that has fewer gives all of its.
        train_limit: Train on at most this many questions per task; None: all of a file, 1000 of a generated task.
        generated: Answer at most this many questions per task by generation, which is slow, where the task has to be
            measured so; 0: none.
        generated_tokens: Break a generated answer off after this many tokens.
        beams: Search answers with this many beams (LLM-Adapters takes 4); 1: the likeliest token each time.
        max_length: Leave out training questions that, with their answer, have more tokens than this.
        eval_batch_size: Process this many questions at once when measuring.
        system: Begin every question with this system message; None: what the model's chat template adds by itself.
        template: Write prompts in this format: the model's own (chat), or a paper's. See
            [`prompts`][dynalora.evaluation.prompts].
        by_generation: Learn and answer multiple choice in words, scored by keywords as LLM-Adapters does, instead of
            comparing the options' likelihoods.
        run_code: Execute the code that the model writes (HumanEval, MBPP), in a sandbox.
        data_seed: Draw generated questions from this seed, which does not change with the seeds of the runs.
        dtype: Load the base model's weights with this data type.
        threads: Compute with this many threads of torch; None: torch's choice.
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
    system: Annotated[str | None, Setting(blank=True)] = None
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
