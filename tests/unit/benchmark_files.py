"""A benchmark folder with a few invented rows of every kind, and questions for which the right answer is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def choice_row(lead: str, question: str, word: str, options: list[str], right: int) -> dict[str, Any]:
    shown = " ".join(f"{word.title()}{n}: {text}" for n, text in enumerate(options, start=1))
    labels = "/".join(f"{word}{n}" for n in range(1, len(options) + 1))
    return {
        "instruction": f"{lead}: {question}\n\n{shown}\n\nAnswer format: {labels}",
        "input": "",
        "output": f"the correct answer is {word}{right}",
        "answer": f"{word}{right}",
    }


CHOOSE = "Please choose the correct answer to the question"
ROWS: dict[str, list[Any]] = {
    "commonsense/boolq.dev": [
        {
            "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": "the correct answer is true",
            "answer": "true",
        },
        {
            "instruction": "Please answer the following question with true or false, question: is fire wet?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": "the correct answer is false",
            "answer": "false",
        },
    ],
    "commonsense/ARC-Easy.dev": [
        choice_row(CHOOSE, f"What is {n} and one?", "answer", [str(n), str(n + 1), "blue", "a cow"], 2)
        for n in range(7)
    ],
    "commonsense/ARC-Easy.train": [
        choice_row(CHOOSE, f"What is {n} less one?", "answer", [str(n - 1), str(n + 1), "blue", "a cow"], 1)
        for n in range(20)
    ],
    "commonsense/openbookqa.train": [
        choice_row(CHOOSE, f"Who has {n} legs?", "answer", ["a dog", "a fish", "a car", "tea"], 1) for n in range(10)
    ],
    "math/gsm8k.dev": [
        {"question": "Ann has 2 pens and buys 3. How many?", "answer": "She has 2+3=<<2+3=5>>5 pens.\n#### 5"},
        {"question": "A town of 1,200 doubles. How many live there?", "answer": "2*1200 = 2400\n#### 2,400"},
    ],
    "math/math.test": [{"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}],
    "math/AQuA.dev": [
        {"instruction": "2+2? Answer Choices: (A) 4 (B) 5 (C) 6 (D) 7 (E) 8", "output": "", "answer": "A"}
    ],
    "math/SVAMP.dev": [{"instruction": "One and one?", "output": "The answer is 3.", "answer": "2.0"}],
    "code/humaneval.dev": [
        {
            "task_id": "T/0",
            "prompt": 'def twice(x):\n    """Two times x."""\n',
            "entry_point": "twice",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        }
    ],
    "code/mbpp.test": [
        {
            "task_id": 11,
            "text": "Write a function to add one.",
            "code": "def inc(x):\n    return x + 1",
            "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
            "test_setup_code": "",
        }
    ],
    "code/humaneval_plus.test": [
        {
            "task_id": "T/0",
            "prompt": 'def half(x):\n    """Half of x."""\n',
            "entry_point": "half",
            "canonical_solution": "    return x / 2\n",
            # In the form of EvalPlus's rows, with a number of more digits than Python reads by default.
            "test": "import numpy as np\n\ndef check(candidate):\n    for given, wanted in ((1, 0.5), (3, 1.5)):\n"
            f"        np.testing.assert_allclose(candidate(given), wanted, atol=1e-6)\n    assert {'9' * 5000} > 0\n",
        }
    ],
    "code/mbpp_plus.test": [
        {
            "task_id": 2,
            "code": "def inc(x):\n    return x + 1",
            "prompt": "Write a function to add one.",
            "test_imports": ["import math"],
            "test_list": ["assert inc(1) == 2"],
            "test": "import numpy as np\n\nfor given, wanted in zip([1, 2**40], [2, 2**40 + 1]):\n"
            "    assert inc(given) == wanted and math.isfinite(np.float64(given))\n",
        }
    ],
    "glue/cola.dev": [{"text": text, "label": n % 2} for n, text in enumerate("abcdefgh")],
    "glue/mrpc.dev": [
        {"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 1},
        {"sentence1": "It rains.", "sentence2": "The sun is very hot today.", "label": 0},
    ],
    "glue/stsb.dev": [{"sentence1": "a b", "sentence2": "c", "label": value} for value in (0.0, 2.5, 5.0)],
    "dialogue/convai2.dev": [
        {
            "personality": ["i like tea.", "i have a dog."],
            "utterances": [
                {"candidates": ["no", "hello there"], "history": ["hi"]},
                {"candidates": ["yes", "he is called rex"], "history": ["hi", "hello there", "and your dog ?"]},
            ],
        }
    ],
    "summarization/xsum.test": [{"document": "A long story about a cat.", "summary": "A cat story."}],
    "qa/squad_v2.dev": [
        {"context": "Rex is a dog.", "question": "Who is Rex?", "answers": {"text": ["a dog", "dog"]}},
        {"context": "Rex is a dog.", "question": "Who is Tom?", "answers": {"text": []}},
    ],
}


def write(folder: Path) -> Path:
    """All of it; every other file is compressed."""
    for number, (name, rows) in enumerate(ROWS.items()):
        path = folder / f"{name}.jsonl{'.gz' if number % 2 else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if number % 2:
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.write(text)
        else:
            path.write_text(text, encoding="utf-8")
    (folder / "text").mkdir()
    (folder / "text" / "wikitext2.valid.txt").write_text(
        "A line of text.\n\n And one more of them.\n" * 9, encoding="utf-8"
    )
    with gzip.open(folder / "text" / "bookcorpus.valid.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\nCHAPTER ONE\n\n" + " ".join(f"This is the sentence number {n} of a book." for n in range(9)))
    (folder / "text" / "cc_news.valid.jsonl").write_text(
        json.dumps({"title": "News", "text": 'He said: "It is the first one." Then there was no more news. Indeed.'})
        + "\n",
        encoding="utf-8",
    )
    return folder
