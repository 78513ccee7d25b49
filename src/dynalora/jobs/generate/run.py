"""`dynalora generate`: an adapter's answers to the prompts of a file, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dynalora.common.files import file_beside
from dynalora.common.progress import rich_progress
from dynalora.jobs.finetune.trained import load_trained
from dynalora.jobs.generate.settings import GenerateSpec
from dynalora.lab.answers import answers_to
from dynalora.lab.data.prompts import Prompt, PromptFields, load_prompts
from dynalora.lab.report import say


def run_generate(spec: GenerateSpec, *, console: Console) -> None:
    """Answer the prompts, and write prompts and answers.

    Raises:
        DynaloraError: The data, the adapter, its base model, or a file that is there already.
    """
    fields = PromptFields(
        spec.prompt_field, spec.response_field, spec.input_field, spec.messages_field, spec.text_field
    )
    prompts = load_prompts(spec.data, fields=fields, split=spec.split, subset=spec.subset, limit=spec.limit)
    trained = load_trained(spec.adapter, spec.model, dtype=spec.dtype, quantization=spec.quantization)
    ask: dict[str, Any] = {
        "system": spec.system or "", "max_new_tokens": spec.max_new_tokens, "batch_size": spec.batch_size,
        "plain": spec.plain,
    }  # fmt: skip
    with rich_progress(console) as progress:
        answers = answers_to(prompts, trained.model, trained.tokenizer, progress=progress, **ask)
        of_base = None
        if spec.base:
            of_base = answers_to(prompts, trained.model, trained.tokenizer, base=True, progress=progress, **ask)
    with file_beside(spec.output, replace=False) as beside:
        lines = records(prompts, answers, of_base)
        beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    say(console, f"{spec.output}: {len(answers):,} answers of {spec.adapter}{' and its base model' * spec.base}.")


def records(
    prompts: Sequence[Prompt], answers: Sequence[str], of_base: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A JSON object for every prompt: `prompt` or `messages`, `response`, and what else there is."""
    made = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        turns = prompt.conversation
        record: dict[str, Any] = {"messages": turns} if len(turns) > 1 else {"prompt": turns[0]["content"]}
        record["response"] = answer
        if of_base is not None:
            record["base_response"] = of_base[index]
        if prompt.response is not None:
            record["reference"] = prompt.response
        made.append(record)
    return made
