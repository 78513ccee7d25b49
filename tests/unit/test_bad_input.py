"""Bad input gets one clear sentence on standard error and exit code 2, before anything is loaded or lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import dynalora
from dynalora.adapter.saved import check_known
from dynalora.cli.flags import in_flags
from dynalora.errors import CheckpointError, ConfigError, DynaloraError, ScheduleError
from dynalora.evaluation.heads import CLASSIFIER
from dynalora.jobs.finetune import run as finetune
from dynalora.jobs.finetune.settings import FinetuneSpec
from dynalora.lab.adapters import load_adapter
from dynalora.lab.configs import adapter_config, method_names
from dynalora.lab.models import load_model
from dynalora.lab.run_folder import RunFolder
from tests.unit import tiny
from tests.unit.program import Program, Shown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(16))


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved adapter of each method, in folders of that name."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in method_names():
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        peft.get_peft_model(base, adapter_config(method, r=2, target_modules=["q_proj"])).save_pretrained(
            folder / method
        )
    return folder


def one_sentence(shown: Shown, *parts: str) -> None:
    assert shown.code == 2
    assert shown.out == ""
    assert shown.err.startswith("Error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.endswith(".\n")
    assert "Traceback" not in shown.err
    assert "\x1b" not in shown.err
    for part in parts:
        assert part in shown.err


class TestFinetune:
    @pytest.fixture(autouse=True)
    def _no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(finetune, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))

    @pytest.fixture
    def asking(self, program: Program, model: Path, rows: Path, tmp_path: Path) -> Any:
        def ask(more: Sequence[str] = (), **changed: str) -> Shown:
            given = {"model": str(model), "data": str(rows), "output": str(tmp_path / "run"), **changed}
            flags = (part for name, value in given.items() for part in (f"--{name}", value))
            return program("finetune", *flags, *more)

        return ask

    def test_unknown_method(self, asking: Any) -> None:
        one_sentence(
            asking(method="qlora"),
            f"Unknown method 'qlora'; did you mean 'lora'? Known are {', '.join(sorted(method_names()))}.",
        )

    def test_rank_0(self, asking: Any) -> None:
        one_sentence(asking(rank="0"), "--rank is 0; give at least 1 and at most 65536.")

    def test_target_modules_that_match_nothing(self, asking: Any) -> None:
        exist = "the model's linear modules are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head."
        one_sentence(asking(**{"target-modules": "query,value"}), f"--target-modules 'query' matches nothing; {exist}")

    def test_data_file_without_the_named_fields(self, asking: Any, rows: Path) -> None:
        shown = asking(**{"prompt-field": "question", "response-field": "answer"})
        one_sentence(shown, f"'{rows}' has no field 'question' and 'answer'; its fields are 'prompt', 'response'.")

    def test_data_file_without_usual_fields(self, asking: Any, tmp_path: Path) -> None:
        file = tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 0}])
        one_sentence(asking(data=str(file)), "its fields are 'text', 'label'.", "--prompt-field and --response-field")

    def test_broken_line(self, asking: Any, tmp_path: Path) -> None:
        file = tmp_path / "x.jsonl"
        file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "respo\n')
        one_sentence(asking(data=str(file)), f"'{file}', line 2: not valid JSON")

    def test_missing_data_file(self, asking: Any) -> None:
        one_sentence(asking(data="nowhere.jsonl"), "There is no file or folder 'nowhere.jsonl'")

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (["--lr", "inf"], "--lr is inf; give a finite number and more than 0."),
            (["--steps", str(10**12)], f"--steps is {10**12}; give at least 1 and at most 2147483647."),
            (["--monitor-text", "x.txt", "--no-retention"], "--monitor-text names text to measure retention on"),
            (["--bf-16"], "No such option: --bf-16"),
            (["--lr"], "Option '--lr' requires an argument; see dynalora finetune --help."),
        ],
    )  # fmt: skip
    def test_values_that_no_run_could_have(self, more: list[str], says: str, asking: Any) -> None:
        one_sentence(asking(more), says)

    def test_a_missing_text_file_is_not_looked_for_elsewhere(self, asking: Any) -> None:
        one_sentence(asking(data="notes.txt"), "There is no file or folder 'notes.txt'")

    def test_a_folder_with_the_name_of_a_method(
        self, asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is the method that is meant."""
        (tmp_path / "dira").mkdir()
        monkeypatch.chdir(tmp_path)
        one_sentence(asking(method="dira", rank="0"), "--rank is 0")

    def test_a_settings_file_that_says_one_thing_twice(self, program: Program, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("rank: 4\nmethod: dira\nrank: 8\n")
        one_sentence(program("finetune", "--config", str(file)), f"'{file}'", "it names 'rank' twice")

    def test_run_folder_in_use(self, asking: Any, tmp_path: Path) -> None:
        with RunFolder.create(tmp_path / "run", {"method": "dira"}):
            one_sentence(asking(), f"'{tmp_path}/run' is in use by process {os.getpid()} on")

    def test_run_folder_of_another_run(self, asking: Any, tmp_path: Path) -> None:
        run = RunFolder.create(tmp_path / "run", {"method": "dira", "model": "m"})
        run.log({"step": 1, "loss": 3.0})
        run.close()
        one_sentence(asking(), "already holds a run (method dira, model m, started", "choose another output folder")

    def test_run_folder_with_other_files(self, asking: Any, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        one_sentence(asking(), "is not empty and holds no run (found notes.txt)")

    def test_nothing_to_resume(self, program: Program, model: Path, rows: Path, tmp_path: Path) -> None:
        shown = program("finetune", "-m", str(model), "-d", str(rows), "-o", str(tmp_path / "run"), "--resume")
        one_sentence(shown, "There is no run to resume", "start it without --resume.")

    def test_model_that_does_not_exist(self, asking: Any) -> None:
        one_sentence(asking(model="no/such-model"), "The model 'no/such-model' cannot be used (")

    def test_settings_left_out(self, program: Program) -> None:
        one_sentence(
            program("finetune", "--method", "dira"), "--model and --data and --output must be given; see --help"
        )

    def test_unknown_setting_in_the_file(self, program: Program, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("modell: x\n")
        one_sentence(
            program("finetune", "-c", str(tmp_path / "job.yaml")), "Unknown setting 'modell'", "did you mean 'model'?"
        )

    @pytest.mark.parametrize(("flag", "field"), [("lr", "learning_rate"), ("rank", "r"), ("option", "method_options")])
    def test_a_flag_in_the_file_is_told_its_name_there(
        self, flag: str, field: str, program: Program, tmp_path: Path
    ) -> None:
        (tmp_path / "job.yaml").write_text(f"{flag}: 5\n")
        one_sentence(
            program("finetune", "-c", str(tmp_path / "job.yaml")),
            f"Unknown setting '{flag}'",
            f"write it as '{field}'.",
        )

    def test_a_model_that_is_a_file(self, asking: Any, model: Path) -> None:
        one_sentence(asking(model=str(model / "model.safetensors")), "is a file; give the Hub id, or the folder")

    def test_a_run_folder_that_cannot_be_made(self, asking: Any, tmp_path: Path) -> None:
        one_sentence(asking(output=f"{tmp_path}/not/../../../../../../../../proc/x"), "/proc/x' cannot be made (")

    def test_a_name_with_a_line_break(self, asking: Any) -> None:
        one_sentence(asking(data="./a\nb"), "'./a\\nb'")

    def test_chats_in_which_nobody_answers(self, asking: Any, tmp_path: Path) -> None:
        file = tiny.write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 3)
        one_sentence(asking(data=str(file)), "(none of 3 ends with an answer in 'messages'); give rows that have one.")

    def test_a_text_to_measure_on_is_named_once(self, asking: Any, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("Text.\n")
        text = f"t={tmp_path}/t.txt"
        one_sentence(asking(more=["--monitor-text", text, "--monitor-text", text]), "--monitor-text uses a name twice")

    @pytest.mark.parametrize(
        "message", ["the model has no adapter.", "adapter 'default' is broken.", "lm-evaluation-harness has no task."]
    )
    def test_sentences_begin_with_a_capital(self, message: str) -> None:
        shown = in_flags(message, FinetuneSpec, [])
        assert shown == (message if message.startswith("lm-") else message[0].upper() + message[1:])
        assert in_flags("seed is -1; give at least 0.", FinetuneSpec, ["-c", "x.yaml"]).startswith("seed is")

    def test_options_of_a_method_keep_their_names(self, asking: Any) -> None:
        one_sentence(asking(option="max_forgeting=1"), "has no option 'max_forgeting'; did you mean 'max_forgetting'?")
        one_sentence(asking(option="r=4"), "'r' is a setting of its own; give it as --rank ")

    def test_unknown_option_of_a_method(self, asking: Any) -> None:
        one_sentence(
            asking(method="dira", option="warmup_steps=1"),
            "Method 'dira' has no option 'warmup_steps'",
            "penalty_weight",
        )

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--seed", "-1"], "--seed is -1; give at least 0"),
            (["--seed", str(2**32)], "--seed is 4294967296; give at least 0 and at most 4294967295"),
            (["--lr", "0"], "--lr is 0; give more than 0"),
            (["--learning-rate=-1"], "--learning-rate is -1; give more than 0"),
            (["-b", "0"], "-b is 0; give at least 1"),
            (["--max-forgetting", "1", "--monitor-every", "0"], "--max-forgetting needs measurements during training"),
            (["-r", "1000000000"], "-r is 1000000000; give at least 1 and at most 65536"),
            (["-r", str(10**400)], "-r is about 1e400; give at least 1 and at most 65536"),
            (["-r", "33"], "-r is 33, but no update of the adapted matrices can have so high a rank"),
            (["-r", "33", "--method", "lora"], "33, but no update of the adapted matrices"),
            (["-r", "33", "--method", "adalora"], "33, but no update of the adapted matrices"),
            (["-r", "33", "--method", "miss"], "33, but no update of the adapted matrices"),
            (["--steps", "5", "--epochs", "2"], "--epochs is 2 and --steps is 5, which exclude each other"),
            (["--steps", "5", "--epochs", "1"], "--epochs is 1 and --steps is 5, which exclude each other"),
            (["--split", "validation"], "is a single file, which has no split 'validation'"),
            (["--eval-split", "validation"], "is a single file, which has no split 'validation'"),
            (["--subset", "main"], "has no subset 'main'; leave out --subset."),
            (["--eval-data", ""], "--eval-data is empty; give it a value, or leave it out."),
            (["--prompt-field", " "], "--prompt-field is empty; give it a value, or leave it out."),
            (["--method", "lora", "-O", "use_rslora=maybe"], "use_rslora must be true or false, got 'maybe'"),
            (["--eval-data", "rows.xlsx"], "There is no file or folder 'rows.xlsx'"),
            (["--packing"], "--packing puts plain texts one behind the other, and the data are chats; leave it out."),
            (["--method", "miss", "--alpha", "8"], "so --alpha (8) means nothing; leave it out."),
            (["--method", "p-tuning", "--dropout", "0.1"], "leave --dropout (0.1) at 0."),
            (["--method", "p-tuning", "-t", "q_proj"], "learns virtual tokens and adapts no modules"),
        ],
    )
    def test_settings_that_cannot_be(self, flags: list[str], words: str, asking: Any) -> None:
        one_sentence(asking(more=flags), words)

    def test_settings_of_a_file_are_called_as_there(self, program: Program, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("model: m\ndata: d\noutput: o\nlearning_rate: 0\n")
        one_sentence(program("finetune", "-c", str(tmp_path / "job.yaml"), "-r", "4"), "learning_rate is 0.0; give")

    def test_a_flag_replaces_its_alternative_in_the_file(self, asking: Any, tmp_path: Path) -> None:
        (tmp_path / "job.yaml").write_text("epochs: 3\n")
        one_sentence(
            asking(more=["-c", str(tmp_path / "job.yaml"), "--steps", "5", "-r", "33"]), "-r is 33, but no update"
        )
        (tmp_path / "job.yaml").write_text("steps: 5\n")
        one_sentence(
            asking(more=["-c", str(tmp_path / "job.yaml"), "--epochs", "2", "-r", "33"]), "-r is 33, but no update"
        )

    def test_a_split_that_no_file_of_a_folder_has(self, asking: Any, rows: Path, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        shutil.copy(rows, tmp_path / "data" / "train.jsonl")
        one_sentence(asking(data=str(tmp_path / "data"), split="test"), "has no split 'test'", "there are train.jsonl")
        shutil.copy(rows, tmp_path / "data" / "validation.jsonl")
        shown = asking(data=str(tmp_path / "data"), split="dev", more=["-r", "33"])
        one_sentence(shown, "-r is 33")  # the rows were read

    @pytest.mark.parametrize("place", ["./model", "/nowhere/model", "~/no-such-model", "runs/first", "a/b/c", "x y"])
    def test_a_path_that_is_not_there_is_not_asked_for_on_the_hub(
        self, place: str, asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        for name in ("AutoConfig", "AutoTokenizer"):
            monkeypatch.setattr(
                getattr(transformers, name), "from_pretrained", lambda *_, **__: pytest.fail("the Hub was asked")
            )
        one_sentence(asking(model=place), f"'{place}'", "there is no such folder")
        one_sentence(asking(data=place), f"There is no file or folder '{place}'")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.jsonl", '{"prompt": "a\\ud83d", "response": "b"}\n'),
            ("x.json", '[{"prompt": "a", "response": "b\\ude00"}]'),
            (
                "x.jsonl",
                '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}',
            ),
            ("x.jsonl", '{"prompt": "a", "response": "b", "meta": {"tags": ["\\ud83d"]}}'),
        ],
    )
    def test_half_an_emoji(self, name: str, content: str, asking: Any, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        one_sentence(asking(data=str(tmp_path / name)), "holds half of a character")

    def test_half_an_emoji_in_text_to_measure_on(self, asking: Any, rows: Path, tmp_path: Path) -> None:
        file = tmp_path / "x.jsonl"
        file.write_text('{"text": "a\\ud83d"}\n')
        one_sentence(asking(more=["--monitor-text", f"x={file}"]), "holds half of a character")
        file.write_text('{"prompt": "\\ud83d\\ude00", "response": "whole"}\n{"prompt": "a", "response": "b"}\n')
        one_sentence(asking(data=str(file), more=["-r", "33"]), "-r is 33")


def test_tasks_that_are_meant(program: Program, tmp_path: Path) -> None:
    one_sentence(program("evaluate", "x", "--task", "arc_esy"), "did you mean 'arc_easy'?")
    pytest.importorskip("reasoning_gym")
    shown = program("compare", "--tasks", "gsm8", "-o", str(tmp_path / "out"))
    one_sentence(shown, "There is no task 'gsm8'; did you mean 'gsm8k'")
    shown = program("forgetting", "--task-a", "spel_backward", "--task-b", "gsm8k", "-o", str(tmp_path / "out"))
    one_sentence(shown, "did you mean 'spell_backward'")
    assert len(shown.err) < 300


class TestAdapters:
    def test_a_classification_task_with_a_causal_adapter(
        self, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        (tmp_path / "glue").mkdir()
        pairs = [{"sentence1": "A", "sentence2": "b", "label": number % 2} for number in range(4)]
        tiny.write_jsonl(tmp_path / "glue" / "rte.dev.jsonl", pairs)
        shown = program("evaluate", str(adapters / "dira"), "--task", "rte", "--data", str(tmp_path))
        one_sentence(shown, "trained with a causal language model", "a classification head", "is needed here")

    @pytest.mark.parametrize("command", ["landscape", "export", "gates", "trim", "compact"])
    def test_an_adapter_of_an_unknown_method(
        self, command: str, adapters: Path, rows: Path, tmp_path: Path, program: Program
    ) -> None:
        copied = Path(shutil.copytree(adapters / "dira", tmp_path / "copied"))
        config = json.loads((copied / "adapter_config.json").read_text())
        (copied / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOPE"}))
        more = {"gates": ["--data", str(rows)], "trim": ["--factor", "0.5"]}.get(command, [])
        output = [str(tmp_path / "out")] if command in ("export", "trim", "compact") else []
        one_sentence(program(command, str(copied), *output, *more), "made by 'NOPE', a method that is unknown here")

    @pytest.fixture
    def truncated(self, adapters: Path, tmp_path: Path) -> Path:
        copied = Path(shutil.copytree(adapters / "dira", tmp_path / "cut"))
        file = copied / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return copied

    @pytest.mark.parametrize("command", [["export"], ["landscape"], ["gates"]], ids=lambda command: command[0])
    def test_truncated_adapter_file(
        self, command: list[str], truncated: Path, rows: Path, tmp_path: Path, program: Program
    ) -> None:
        more = {"export": [str(tmp_path / "out")], "gates": ["--data", str(rows)]}.get(command[0], [])
        one_sentence(program(*command, str(truncated), *more), "adapter_model.safetensors", "is truncated or damaged")
        assert not (tmp_path / "out").exists()

    def test_truncated_adapter_file_in_a_script(self, truncated: Path, model: Path) -> None:
        with pytest.raises(CheckpointError, match="is truncated or damaged"):
            peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), truncated)
        with pytest.raises(CheckpointError, match="is truncated or damaged"):
            load_adapter(truncated)

    def test_gates_of_an_adapter_without_gates(self, adapters: Path, rows: Path, program: Program) -> None:
        shown = program("gates", str(adapters / "dira"), "--data", str(rows))
        one_sentence(
            shown,
            f"The adapter '{adapters}/dira' was made by dira, which has no gates; give a disel adapter, "
            "or one that was trained with gates=True.",
        )

    def test_export_of_an_adapter_whose_update_depends_on_the_input(
        self, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        one_sentence(program("export", str(adapters / "disel"), str(tmp_path / "out")), "update depends on the input")
        assert not (tmp_path / "out").exists()

    def test_a_snapshot_of_gates_that_are_not_there(self, adapters: Path, tmp_path: Path, program: Program) -> None:
        shown = program("export", str(adapters / "dira"), str(tmp_path / "out"), "--calibrate", str(tmp_path / "none"))
        one_sentence(
            shown, "--calibrate takes an adapter's gates", "was made by dira", "exported exactly; leave it out"
        )

    def test_export_of_an_adapter_that_is_a_lora_already(
        self, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        one_sentence(program("export", str(adapters / "lora"), str(tmp_path / "out")), "LORA")

    def test_export_into_a_folder_in_use(self, adapters: Path, tmp_path: Path, program: Program) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        one_sentence(program("export", str(adapters / "dira"), str(tmp_path)), "is not an empty folder")
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_adapter_made_by_another_method(self, adapters: Path) -> None:
        with pytest.raises(CheckpointError, match="was made by DIRA, not by DISEL"):
            dynalora.DiselConfig.from_pretrained(adapters / "dira")

    def test_weights_made_by_another_method(self, adapters: Path, tmp_path: Path, program: Program) -> None:
        mixed = Path(shutil.copytree(adapters / "dira", tmp_path / "mixed"))
        shutil.copy(adapters / "disel" / "adapter_model.safetensors", mixed)
        with pytest.raises(CheckpointError, match="belong to different adapters"):
            dynalora.DiraConfig.from_pretrained(mixed)

    @pytest.mark.parametrize("command", ["serve-check", "landscape"])
    @pytest.mark.parametrize(
        ("field", "value", "kind"),
        [
            ("base_model_name_or_path", ["a"], "a name"),
            ("r", "eight", "a number above 0"),
            ("lora_alpha", "x", "a number above 0"),
            ("r", -4, "a number above 0"),
        ],
    )
    def test_a_configuration_with_values_of_another_kind(
        self, field: str, value: Any, kind: str, command: str, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        folder = shutil.copytree(adapters / "lora", tmp_path / "lora")
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, field: value}))
        expected = f"The configuration in {folder} says {field}={value!r}, where {kind} is needed"
        one_sentence(program(command, str(folder)), expected)

    @pytest.mark.parametrize("kind", PEFT_TYPE_TO_CONFIG_MAPPING.values(), ids=lambda kind: kind.__name__)
    def test_a_rank_that_is_a_methods_own_default_is_no_mistake(self, kind: type[Any], tmp_path: Path) -> None:
        """OFT's is 0, beside which it has the size of its blocks."""
        own = {name: getattr(kind, name) for name in ("r", "lora_alpha") if hasattr(kind, name)}
        method = next(name for name, each in PEFT_TYPE_TO_CONFIG_MAPPING.items() if each is kind)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method.value, **own}))
        assert check_known(str(tmp_path)) == method.value.lower()

    @pytest.mark.parametrize("method", ["lora", "dira"])
    def test_a_file_of_weights_without_any(self, method: str, adapters: Path, tmp_path: Path, program: Program) -> None:
        folder = shutil.copytree(adapters / method, tmp_path / method)
        save_file({}, folder / "adapter_model.safetensors")
        one_sentence(program("serve-check", str(folder)), f"holds no weights of {method.upper()} (it is empty)")

    def test_weights_of_peft_that_are_lacking_or_no_numbers(
        self, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        folder = shutil.copytree(adapters / "lora", tmp_path / "lora")
        weights = load_file(folder / "adapter_model.safetensors")
        first = min(weights)
        save_file({**weights, first: weights[first] * float("nan")}, folder / "adapter_model.safetensors")
        one_sentence(program("landscape", str(folder)), f"has NaN or infinite values in {first}; use another copy")
        del weights[first]
        save_file(weights, folder / "adapter_model.safetensors")
        one_sentence(
            program("chat", str(folder)), f"lacks 1 of the weights that its configuration names (the first: {first})"
        )

    def test_files_and_runs_that_are_no_adapters(self, rows: Path, tmp_path: Path, program: Program) -> None:
        one_sentence(program("serve-check", str(rows)), f"'{rows}' is no adapter, but a file; give a run folder")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text('{"finished": null}')
        one_sentence(
            program("export", str(tmp_path / "run"), "x"), "holds no adapter (the run did not finish; resume it)."
        )
        (tmp_path / "run" / "run.json").write_text('{"finished": "2026-01-01"}')
        one_sentence(
            program("export", str(tmp_path / "run"), "x"), "holds no adapter (this kind of run keeps none; give"
        )
        inside = tmp_path / "run" / "seed-42" / "initial" / "adapter"
        inside.mkdir(parents=True)
        (inside / "adapter_config.json").write_text("{}")
        one_sentence(
            program("export", str(tmp_path / "run"), "x"), f"(it has 1 deeper inside; name one, such as '{inside}')."
        )

    @pytest.mark.parametrize(
        ("words", "flag", "needed"),
        [
            (["export", "--limit", "3"], "--limit is 3", "--calibrate"),
            (["export", "-m", "x"], "-m is x", "--calibrate"),
            (["landscape", "--split", "test"], "--split is test", "--data"),
            (["bench", "--new-tokens", "5"], "--new-tokens is 5", "--generate"),
        ],
    )
    def test_flags_that_would_count_for_nothing(
        self, words: list[str], flag: str, needed: str, adapters: Path, tmp_path: Path, program: Program
    ) -> None:
        places = {"export": [str(adapters / "dira"), str(tmp_path / "x")], "landscape": [str(adapters / "dira")]}
        shown = program(words[0], *places.get(words[0], []), *words[1:])
        one_sentence(shown, f"{flag}, which counts with {needed} only; give both, or leave it out.")

    @pytest.mark.parametrize(
        ("flag", "value", "least"),
        [
            ("-n", "0", "at least 1"),
            ("--window", "-1", "at least 2"),
            ("--code-seconds", "nan", "a finite number and more than 0"),
            ("--shots", "-1", "at least 0"),
        ],
    )
    def test_numbers_that_no_evaluation_could_have(self, flag: str, value: str, least: str, program: Program) -> None:
        one_sentence(program("evaluate", "m", "-t", "gsm8k", flag, value), f"{flag} is {value}; give {least}")

    def test_a_link_to_nothing_is_not_looked_for_on_the_hub(
        self, adapters: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "gone").symlink_to("/nowhere/at/all")
        one_sentence(program("merge", str(adapters / "dira"), "-o", "x", "-m", "gone"), "there is no such folder")
        shown = program("generate", str(adapters / "dira"), "-d", "gone", "-o", "x")
        one_sentence(shown, "There is no file or folder 'gone'")

    def test_a_model_without_a_tokenizer(self, adapters: Path, model: Path, tmp_path: Path, program: Program) -> None:
        folder = shutil.copytree(model, tmp_path / "model")
        for file in folder.glob("tok*"):
            file.unlink()
        shown = program("merge", str(adapters / "dira"), "-o", str(tmp_path / "x"), "-m", str(folder))
        one_sentence(shown, f"The tokenizer of '{folder}' cannot be loaded (its folder has none)")

    def test_folder_without_an_adapter(self, tmp_path: Path, program: Program) -> None:
        one_sentence(
            program("landscape", str(tmp_path)), f"'{tmp_path}' holds no adapter (it has no adapter_config.json; give"
        )
        one_sentence(program("landscape", str(tmp_path / "none")), f"There is no adapter '{tmp_path}/none'")
        RunFolder.create(tmp_path / "run", {}).close()
        one_sentence(
            program("landscape", str(tmp_path / "run")), "holds no adapter (the run did not finish; resume it)."
        )

    def test_broken_adapter_config(self, adapters: Path, tmp_path: Path, program: Program) -> None:
        broken = Path(shutil.copytree(adapters / "dira", tmp_path / "broken"))
        (broken / "adapter_config.json").write_text('{"peft_type": "DIRA", ')
        one_sentence(program("landscape", str(broken)), "adapter_config.json is not readable as JSON")

    def test_adapter_of_another_base_model(self, adapters: Path, tmp_path: Path) -> None:
        words = tiny.tokenizer()
        words.save_pretrained(tmp_path / "small")
        tiny.model(len(words), layers=1).save_pretrained(tmp_path / "small")
        with pytest.raises(DynaloraError, match=r"does not fit the model .*layers\.1\."):
            load_adapter(adapters / "dira", str(tmp_path / "small"))


class TestBaseModels:
    """Weights under a configuration that is not theirs: transformers warns, and draws random ones in their place."""

    @pytest.fixture
    def changed(self, model: Path, tmp_path: Path) -> Any:
        """The model with other settings in its config.json, and some of its weights left out."""

        def change(without: Sequence[str] = (), **settings: Any) -> Path:
            folder = Path(shutil.copytree(model, tmp_path / "changed"))
            config = json.loads((folder / "config.json").read_text())
            config.pop("layer_types", None)
            (folder / "config.json").write_text(json.dumps({**config, **settings}))
            weights = load_file(folder / "model.safetensors")
            kept = {name: tensor for name, tensor in weights.items() if name not in without}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
            return folder

        return change

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
                ["a GPTNeoXForCausalLM: 23 of 24 are not in its files (the first: gpt_neox.embed_in.weight)"],
            ),
            ({"num_hidden_layers": 3}, ["9 of 30 are not in its files (the first: model.layers.2."]),
            ({"vocab_size": 64}, ["has the shape (258, 32) in its files, and (64, 32) by the configuration"]),
            ({"without": ["lm_head.weight"]}, ["(the first: lm_head.weight), and random ones would stand in"]),
        ],
    )
    def test_weights_that_do_not_fit(
        self, settings: dict[str, Any], words: list[str], changed: Any, rows: Path, tmp_path: Path, program: Program
    ) -> None:
        folder = changed(**settings)
        shown = program("finetune", "-m", str(folder), "-d", str(rows), "-o", str(tmp_path / "run"), "-r", "2")
        before_loading = dataclasses.replace(shown, out="")  # what is said until weights are loaded is no mistake
        expected = f"The weights of '{folder}' do not fit its config.json"
        one_sentence(before_loading, expected, "of one model.", *words)
        assert not (tmp_path / "run" / "config.yaml").exists()

    def test_a_masked_language_model_is_no_causal_one(self, tmp_path: Path) -> None:
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"is a masked language model \(BertForMaskedLM\), whose tokens see"):
            load_model(str(tmp_path))
        assert load_model(str(tmp_path), heads=(CLASSIFIER,)).num_labels == 2

    def test_layers_that_are_left_out_are_named(self, changed: Any, caplog: pytest.LogCaptureFixture) -> None:
        load_model(str(changed(num_hidden_layers=1)), dtype="float32")
        assert "hold more layers than its config.json names, and 9 of their weights are left out" in caplog.text

    def test_tied_heads_and_fresh_classifiers_are_no_mistakes(
        self, changed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = str(changed(without=["lm_head.weight"], tie_word_embeddings=True))
        load_model(folder, dtype="float32")
        classifier = load_model(folder, dtype="float32", heads=(CLASSIFIER,), labels=3)
        assert classifier.num_labels == 3
        classifier.save_pretrained(tmp_path / "of-three")
        assert not [record for record in caplog.records if record.name.startswith("dynalora")]
        other = load_model(str(tmp_path / "of-three"), dtype="float32", heads=(CLASSIFIER,), labels=2)
        assert other.score.weight.shape[0] == 2
        assert torch.equal(other.get_input_embeddings().weight, classifier.get_input_embeddings().weight)
        assert "has a head of other classes (score.weight has the shape (3, 32), and (2, 32) is needed)" in caplog.text


def test_missing_total_steps() -> None:
    """Only where no trainer tells the length of the run: a loop written by hand."""
    model = peft.get_peft_model(tiny.model(64), adapter_config("dira", target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    with pytest.raises(ScheduleError, match="total_steps"):
        optimizer.step()


def test_rank_0_in_a_script() -> None:
    with pytest.raises(ConfigError, match="r must be a positive integer, got 0"):
        dynalora.DiraConfig(r=0)


def test_error_is_red_in_a_terminal_only(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in program("bench", "--methods", "x").err
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31m" in program("bench", "--methods", "x").err


@pytest.mark.slow
def test_as_a_process_of_its_own(rows: Path, tmp_path: Path) -> None:
    arguments = ["finetune", "-m", "m", "-d", str(rows), "-o", str(tmp_path / "run"), "--method", "qlora"]
    done = subprocess.run(
        [sys.executable, "-m", "dynalora.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(dynalora.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    # Other libraries may have had their say on standard error while they were imported.
    last = done.stderr.splitlines(keepends=True)[-1]
    one_sentence(Shown(done.returncode, done.stdout, last), "Unknown method 'qlora'")
    assert "Traceback" not in done.stderr


def test_bad_settings_file_is_not_mistaken_for_data(program: Program, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps([1, 2]))
    one_sentence(program("bench", "--config", str(tmp_path / "job.yaml")), "holds a list; write lines of 'name: value'")
