"""Programming tasks: the model continues the beginning of a program, which its tests then run."""

from __future__ import annotations

from collections.abc import Sequence

from dynalora.common.progress import counted
from dynalora.errors import ConfigError
from dynalora.evaluation.heads import CAUSAL_LM
from dynalora.evaluation.kinds.base import Benchmark, Prepared, Subject
from dynalora.evaluation.kinds.generate import GenerateKind
from dynalora.evaluation.sandbox import check_sandbox, run_program


class CodeKind(GenerateKind):
    """Programming tasks, whose answers are executed in a sandbox."""

    heads = (CAUSAL_LM,)
    strip = False

    def check(self, task: Benchmark, *, run_code: bool = False, weak_sandbox: bool = False) -> None:
        if not run_code:
            raise ConfigError(
                f"The task {task.name} executes code that the model writes; allow it with run_code=True "
                "(--run-code). It runs in a sandbox, without network and without your files."
            )
        check_sandbox(weak=weak_sandbox, packages=task.packages)

    def judged(self, subject: Subject, prepared: Prepared, answers: Sequence[str]) -> list[bool]:
        """Whether each answer passes its tests."""
        passed = []
        what = f"{prepared.task.title}: running what {subject.name} wrote"
        pairs = list(zip(prepared.items, answers, strict=True))
        for item, answer in counted(pairs, what, subject.progress):
            assert item.program is not None
            outcome = run_program(
                item.program(answer), prepared.limits, weak=prepared.weak_sandbox, packages=prepared.task.packages
            )  # fmt: skip
            passed.append(outcome.passed)
        return passed


CODE = CodeKind()
