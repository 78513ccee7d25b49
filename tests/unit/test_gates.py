"""Recording DISeL's gates on text."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tokenizers import processors
from torch import nn

import dynalora
from dynalora import DiraConfig, DiselConfig
from dynalora.drawing import gates as gate_plots
from dynalora.errors import ConfigError, DynaloraError
from dynalora.evaluation.tokens import Conversation, ensure_pad_token, tokenize
from dynalora.forgetting.gates import (
    BINS,
    DOCUMENT_GROUPS,
    TOKEN_BINS,
    GateRecord,
    binned_auc,
    depth_group,
    depth_separation,
    gate_separation,
    part_of,
)
from dynalora.jobs.gates.report import kinds_table
from dynalora.lab.data.collator import Collator
from tests.toys import TOYS
from tests.unit import tiny

LLAMA = TOYS["llama"]


def gated(**options: Any) -> Any:
    torch.manual_seed(0)
    config = DiselConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False, **options)
    return peft.get_peft_model(LLAMA.build(), config)


def by_hand(model: Any, ids: torch.Tensor, mask: torch.Tensor, suffix: str) -> torch.Tensor:
    """σ(W_g x + b_g) of one layer at the counted tokens, from the layer's own input."""
    layer = next(m for n, m in model.named_modules() if n.endswith(suffix))
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    handle.remove()
    x = seen[0][mask.bool()].double()
    weight, bias = layer.disel_gate_weight["default"].double(), layer.disel_gate_bias["default"].double()
    return torch.sigmoid(x @ weight.t() + bias).detach()


def test_statistics_equal_those_by_hand_over_several_batches() -> None:
    model = gated(gate_bias_init=0.0)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length in (5, 9):
        ids = torch.randint(3, 60, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    recorded = dynalora.record_gates(model, batches)
    assert [(row.layer, row.kind) for row in recorded] == [(i, k) for i in (0, 1) for k in ("q_proj", "down_proj")]
    expected = torch.cat(
        [by_hand(model, b["input_ids"], b["attention_mask"], "layers.1.mlp.down_proj") for b in batches]
    )
    row = recorded[3]
    assert row.tokens == len(expected) == 3 + 5 + 7 + 9
    torch.testing.assert_close(row.mean, expected.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(row.mean_square, expected.square().mean(0), atol=1e-6, rtol=1e-6)
    assert int(row.histogram.sum()) == 3 * row.tokens
    assert row.openness == pytest.approx(float(expected.mean()), abs=1e-6)


def test_labels_narrow_to_the_response() -> None:
    model = gated()
    ids = torch.arange(3, 13)[None]
    labels = ids.clone()
    labels[:, :6] = -100
    recorded = dynalora.record_gates(model, [{"input_ids": ids, "labels": labels}])
    assert {row.tokens for row in recorded} == {4}
    whole = torch.zeros_like(ids)
    whole[:, 6:] = 1
    x = by_hand(model, ids, torch.ones_like(ids), "layers.0.self_attn.q_proj")[6:]
    torch.testing.assert_close(recorded[0].mean, x.mean(0), atol=1e-6, rtol=1e-6)


def test_gates_start_almost_closed_and_the_mode_is_left_alone() -> None:
    model = gated(gate_weight_init="zeros")
    model.train()
    recorded = dynalora.record_gates(model, [{"input_ids": torch.arange(3, 13)[None]}])
    assert model.training
    assert all(row.openness == pytest.approx(0.0474258732, abs=1e-6) for row in recorded)  # σ(−3)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_recorded_says_why() -> None:
    with pytest.raises(DynaloraError, match="no adapter with gates"):
        dynalora.record_gates(peft.get_peft_model(LLAMA.build(), DiraConfig(target_modules=["q_proj"])), ["text"])
    with pytest.raises(ConfigError, match="need a tokenizer"):
        dynalora.record_gates(gated(), ["text"])
    with pytest.raises(ConfigError, match="got one string"):
        dynalora.record_gates(gated(), "text")
    with pytest.raises(ConfigError, match="no tokens"):
        dynalora.record_gates(gated(), [])


@pytest.mark.parametrize(("layer", "group"), [(0, "early"), (9, "early"), (10, "middle"), (29, "late"), (None, "none")])
def test_depth_groups_are_thirds(layer: int | None, group: str) -> None:
    assert depth_group(layer, 30) == group


# --- streaming against everything in memory ----------------------------------------------------------------

LAYERS = [f"model.layers.{i}.{k}" for i in (0, 1) for k in ("self_attn.q_proj", "mlp.down_proj")]


def documents(seed: int, count: int, low: int = 3, high: int = 60) -> list[torch.Tensor]:
    """Texts of different lengths as token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (length,), generator=generator) for length in lengths]


def batched(texts: list[torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches padded on the right with a token that would change everything if it counted."""
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        ids = torch.full((len(some), max(map(len, some))), 63)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(some):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        yield {"input_ids": ids, "attention_mask": mask}


def in_memory(model: Any, texts: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """For each layer the gates of every text (tokens, r), float64, each text alone and unpadded."""
    return {name: [by_hand(model, text[None], torch.ones(1, len(text)), name) for text in texts] for name in LAYERS}


@pytest.fixture(scope="module")
def model() -> Any:
    made = gated(gate_bias_init=-1.0)
    with torch.no_grad():  # gates that differ between tokens, as trained ones do
        for name, parameter in made.named_parameters():
            if "gate_weight" in name:
                parameter.mul_(4)
    return made


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    return documents(1, 23)


@pytest.fixture(scope="module")
def record(model: Any, texts: list[torch.Tensor]) -> GateRecord:
    return dynalora.record_gates(model, batched(texts, 4))


def test_streaming_histograms_equal_those_of_everything_in_memory(
    model: Any, texts: list[torch.Tensor], record: GateRecord
) -> None:
    whole = in_memory(model, texts)
    assert record.documents == 23
    assert [row.module for row in record] == LAYERS
    logit_edges = np.linspace(-16, 16, TOKEN_BINS + 1)
    for row in record:
        gates = torch.cat(whole[row.module])
        assert row.tokens == len(gates) == sum(map(len, texts))
        torch.testing.assert_close(row.mean, gates.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(row.deviation, gates.std(0, correction=0), atol=1e-5, rtol=0)
        for rank in range(3):
            counts, _ = np.histogram(gates[:, rank].numpy(), bins=BINS, range=(0, 1))
            # A gate within rounding of a bin's edge may fall on either side.
            assert np.abs(counts - row.rank_histogram[rank].numpy()).sum() <= 2
        score = gates.mean(1)
        counts, _ = np.histogram(torch.logit(score).numpy(), bins=logit_edges)
        assert np.abs(counts - row.token_histogram.sum(0).numpy()).sum() <= 4
        # Document i belongs to group i modulo the number of groups.
        for group in (0, 1, DOCUMENT_GROUPS - 1):
            chosen = [text for i, text in enumerate(texts) if i % DOCUMENT_GROUPS == group]
            assert int(row.token_histogram[group].sum()) == sum(map(len, chosen))
    every = torch.stack([torch.cat(whole[name]).mean(1) for name in LAYERS])
    for depth, chosen_layers in (("early", [0, 1]), ("middle", [2, 3]), ("all", [0, 1, 2, 3])):
        counts, _ = np.histogram(torch.logit(every[chosen_layers].mean(0)).numpy(), bins=logit_edges)
        assert np.abs(counts - record.depth_histograms[depth].sum(0).numpy()).sum() <= 4


@pytest.mark.parametrize("size", [1, 7, 23])
def test_the_batch_size_does_not_matter(size: int, model: Any, texts: list[torch.Tensor], record: GateRecord) -> None:
    other = dynalora.record_gates(model, batched(texts, size))
    assert other.documents == record.documents
    torch.testing.assert_close(other.moments, record.moments, atol=1e-4, rtol=1e-6)
    for a, b in zip(other, record, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.mean, b.mean, atol=1e-7, rtol=1e-6)
        assert int((a.rank_histogram - b.rank_histogram).abs().sum()) <= 2
        assert int((a.token_histogram - b.token_histogram).abs().sum()) <= 4


def test_intervals_are_those_of_a_ratio_of_sums_over_documents(
    model: Any, texts: list[torch.Tensor], record: GateRecord
) -> None:
    whole = in_memory(model, texts)
    lengths = np.array([len(text) for text in texts], dtype=float)

    def by_documents(names: list[str]) -> tuple[float, float]:
        """Mean and its linearised standard error, from the definition."""
        residual = np.zeros(len(texts))
        means = []
        for name in names:
            sums = np.array([float(gates.mean(1).sum()) for gates in whole[name]])
            mean = sums.sum() / lengths.sum()
            residual += (sums - mean * lengths) / lengths.sum() / len(names)
            means.append(mean)
        count = len(texts)
        return float(np.mean(means)), float(np.sqrt(count / (count - 1) * (residual**2).sum()))

    for names in (LAYERS, LAYERS[1:2], LAYERS[2:]):
        value, error = by_documents(names)
        found = record.mean(lambda row, names=names: row.module in names)
        assert found is not None
        assert found.value == pytest.approx(value, abs=1e-6)
        assert found.high - found.low == pytest.approx(2 * 1.959964 * error, rel=1e-3)  # type: ignore[operator]
    # The formula itself, against resampling whole documents.
    generator = np.random.default_rng(0)
    sums = np.array([float(gates.mean(1).sum()) for gates in whole[LAYERS[1]]])
    picks = generator.integers(0, len(texts), (4000, len(texts)))
    bootstrap = (sums[picks].sum(1) / lengths[picks].sum(1)).std()
    assert by_documents(LAYERS[1:2])[1] == pytest.approx(bootstrap, rel=0.15)


def test_one_document_has_no_interval(model: Any, texts: list[torch.Tensor]) -> None:
    one = dynalora.record_gates(model, batched(texts[:1], 1))
    mean = one.mean()
    assert mean is not None
    assert (mean.low, mean.high) == (None, None)
    assert one.mean(lambda row: False) is None
    (first, *_) = gate_separation(one, one)
    assert (first.low, first.high) == (None, None)
    assert first.auc == pytest.approx(0.5)


# --- separation -------------------------------------------------------------------------------------------


def area(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """P(first > second) + ½ P(first = second), pair by pair."""
    difference = np.asarray(first)[:, None] - np.asarray(second)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def test_binned_area_is_that_of_the_bins() -> None:
    generator = np.random.default_rng(3)
    for _ in range(5):
        first, second = generator.integers(0, 12, 70), generator.integers(2, 16, 50)
        counts = [torch.from_numpy(np.bincount(x, minlength=16)) for x in (first, second)]
        auc, error = binned_auc(*counts)
        assert auc == pytest.approx(area(first, second))
        # Whatever the order within the bins, the area stays within the error.
        spread = [x + generator.random(len(x)) * 0.999 for x in (first, second)]
        assert abs(area(*spread) - auc) <= error + 1e-12
        best, worst = area(first + 0.5, second), area(first - 0.5, second)
        assert best - auc == pytest.approx(error)
        assert auc - worst == pytest.approx(error)
    assert binned_auc(torch.tensor([0, 0, 3]), torch.tensor([2, 5, 0])) == (1.0, 0.0)
    with pytest.raises(ConfigError, match="without counts"):
        binned_auc(torch.zeros(4), torch.ones(4))


def test_separation_is_the_area_between_the_tokens_of_two_domains(
    model: Any, texts: list[torch.Tensor], record: GateRecord
) -> None:
    other_texts = documents(9, 17, low=30, high=40)
    other = dynalora.record_gates(model, batched(other_texts, 3))
    scores = [
        {name: [gates.mean(1).numpy() for gates in found] for name, found in in_memory(model, some).items()}
        for some in (texts, other_texts)
    ]
    found = gate_separation(record, other)
    assert [item.name for item in found] == LAYERS
    assert max(abs(item.auc - 0.5) for item in found) > 0.05  # the domains do differ

    def without(which: int, group: int, name: str) -> float:
        kept = [
            [
                score
                for index, score in enumerate(scores[side][name])
                if side != which or index % DOCUMENT_GROUPS != group
            ]
            for side in (0, 1)
        ]
        return area(np.concatenate(kept[0]), np.concatenate(kept[1]))

    for item in found:
        exact = without(-1, 0, item.name)
        assert item.bin_error < 0.02  # real ties too: in the first layer equal tokens have equal gates
        assert abs(item.auc - exact) <= item.bin_error + 1e-3  # rounding may move a token to the next bin
        variance = 0.0
        for which in (0, 1):
            left = np.array([without(which, group, item.name) for group in range(DOCUMENT_GROUPS)])
            variance += (DOCUMENT_GROUPS - 1) * left.var()
        assert item.high is not None
        assert item.low is not None
        half = 2.262 * math.sqrt(variance)  # t, 9 degrees of freedom
        assert (item.high - item.low) / 2 == pytest.approx(half, rel=0.02)
    backwards = gate_separation(other, record)
    for item, mirrored in zip(found, backwards, strict=True):
        assert item.auc + mirrored.auc == pytest.approx(1)
    by_depth = depth_separation(record, other)
    assert list(by_depth) == ["early", "middle", "all"]  # two blocks have no late third
    every = [np.mean([np.concatenate(scores[side][name]) for name in LAYERS], axis=0) for side in (0, 1)]
    assert abs(by_depth["all"].auc - area(*every)) <= by_depth["all"].bin_error + 1e-3


def test_gates_that_open_on_a_domain_separate_it() -> None:
    """Gates made to open on some tokens: the number says so."""
    made = gated(gate_weight_init="zeros")
    layer = next(m for n, m in made.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    tuned, kept = documents(2, 12, 3, 10), documents(3, 12, 30, 40)
    for some in (tuned, kept):
        made.eval()(input_ids=torch.cat(some)[None])
    handle.remove()
    with torch.no_grad():  # the first block's inputs depend on the token alone: a plane between the means
        weight = seen[0][0].mean(0) - seen[1][0].mean(0)
        layer.disel_gate_weight["default"].copy_(weight.expand(3, -1))
    first, second = (dynalora.record_gates(made, batched(some, 4)) for some in (tuned, kept))
    separation = {item.name: item for item in gate_separation(first, second)}
    assert separation[LAYERS[0]].auc > 0.8
    assert separation[LAYERS[1]].auc == 0.5  # gates that look at nothing tell nothing apart
    assert separation[LAYERS[1]].bin_error == 0.5  # and all tokens share a bin


def test_records_of_different_layers_are_not_compared(record: GateRecord) -> None:
    torch.manual_seed(0)
    other = peft.get_peft_model(LLAMA.build(), DiselConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ConfigError, match="different layers"):
        gate_separation(record, dynalora.record_gates(other, [{"input_ids": torch.arange(3, 13)[None]}]))


# --- which tokens count -----------------------------------------------------------------------------------


def words_model() -> tuple[Any, Any]:
    words = tiny.tokenizer()
    ensure_pad_token(words)
    torch.manual_seed(0)
    made = peft.get_peft_model(
        tiny.model(len(words)), DiselConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False)
    )
    return made, words


def test_of_instruction_data_exactly_the_response_tokens_count() -> None:
    made, words = words_model()
    chats: list[Conversation] = [
        [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "One!"}],
        [
            {"role": "user", "content": "A longer question."},
            {"role": "assistant", "content": "First."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "The second answer."},
        ],
    ]
    rows = tokenize(chats, words).rows
    found = dynalora.record_gates(made, [Collator(0)(rows)])
    answers = [["One!<|im_end|>"], ["First.<|im_end|>", "The second answer.<|im_end|>"]]
    expected = []
    for chat, spoken in zip(chats, answers, strict=True):
        text = words.apply_chat_template(chat, tokenize=False)
        ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
        mask = torch.zeros_like(ids)
        for answer in spoken:  # one token per byte, one for the end of a turn
            size = len(answer) - len("<|im_end|>") + 1
            start = len(words(text[: text.index(answer)], add_special_tokens=False)["input_ids"])
            mask[0, start : start + size] = 1
        expected.append(by_hand_masked(made, ids, mask, "layers.1.mlp.up_proj"))
    gates = torch.cat(expected)
    row = next(row for row in found if row.module.endswith("layers.1.mlp.up_proj"))
    assert row.tokens == len(gates) == 5 + 7 + 19
    torch.testing.assert_close(row.mean, gates.mean(0), atol=1e-6, rtol=0)


def by_hand_masked(model: Any, ids: torch.Tensor, counted: torch.Tensor, suffix: str) -> torch.Tensor:
    """As `by_hand`, with attention to all tokens."""
    return by_hand(model, ids, torch.ones_like(ids), suffix)[counted[0].bool()]


def test_of_plain_text_all_tokens_but_the_special_ones_count() -> None:
    made, words = words_model()
    words.bos_token = "<|im_start|>"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", words.bos_token_id)]
    )
    passages = ["Some text.", "A longer passage, in the same batch."]
    assert words(passages[0])["input_ids"][0] == words.bos_token_id
    for size in (1, 2):
        found = dynalora.record_gates(made, (text for text in passages), words, batch_size=size)
        assert {row.tokens for row in found} == {sum(map(len, passages))}
        assert found.documents == 2
    ids = torch.tensor([words(passages[1])["input_ids"]])
    single = dynalora.record_gates(made, passages[1:], words)
    gates = by_hand(made, ids, torch.ones_like(ids), "layers.1.mlp.up_proj")[1:]
    torch.testing.assert_close(single[3].mean, gates.mean(0), atol=1e-6, rtol=0)
    cut = dynalora.record_gates(made, passages[1:], words, max_length=9)
    assert cut.tokens == 8


class Odd(nn.Module):
    """A model whose layers see tokens in a row, a pooled vector, and some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.flat, self.pooled, self.some = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        y = self.flat(x.reshape(-1, 8))
        result: torch.Tensor = self.pooled(x.mean(1)).sum() + self.some(y[:5]).sum()
        return result


def test_layers_that_see_something_else_than_the_tokens(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    made = peft.get_peft_model(Odd(), DiselConfig(r=2, target_modules=["flat", "pooled", "some"]))
    ids = torch.arange(3, 15).reshape(3, 4)
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    mask[2] = 0  # a row without any token is no document
    with caplog.at_level(logging.WARNING, "dynalora"):
        found = dynalora.record_gates(made, [{"input_ids": ids, "attention_mask": mask}])
    assert [(row.module, row.tokens) for row in found] == [("flat", 6), ("pooled", 2)]
    assert found.documents == 2
    assert "1 layers see other rows" in caplog.text
    assert found.moments.shape == (3, 2, 2)
    layer: Any = made.base_model.model.flat
    expected = layer.gates(made.base_model.model.embed(ids[mask.bool()]), "default").double()
    torch.testing.assert_close(found[0].mean, expected.mean(0), atol=1e-6, rtol=0)


# --- plots ------------------------------------------------------------------------------------------------


def test_histograms_are_drawn(record: GateRecord, tmp_path: Path) -> None:
    figure = dynalora.plot_gates({"math": record, "code": record[:2]}, str(tmp_path / "gates.svg"))
    assert (tmp_path / "gates.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["early layers", "middle layers"]
    shares = [patch.get_data().values for axis in figure.axes for patch in axis.patches]
    assert len(shares) == 3  # code has no middle layers
    assert all(float(share.sum()) == pytest.approx(1) for share in shares)
    early = (record[0].histogram + record[1].histogram).double()
    np.testing.assert_allclose(shares[0], (early / early.sum()).numpy())
    styles = {(p.get_label(), str(p.get_linestyle())) for axis in figure.axes for p in axis.patches}
    assert len({style for _, style in styles}) == 2  # told apart without colour
    figure = gate_plots.plot_gates_by_kind(record)
    assert [patch.get_label() for patch in figure.axes[0].patches] == ["q_proj", "down_proj"]
    own = record[3].histogram.double()
    np.testing.assert_allclose(figure.axes[1].patches[1].get_data().values, (own / own.sum()).numpy())


def test_attention_and_mlp_are_added_up(record: GateRecord) -> None:
    figure = gate_plots.plot_gates_by_part(record)
    assert [patch.get_label() for patch in figure.axes[0].patches] == ["attention", "MLP"]
    named = {row.kind: part_of(row.module) for row in record}
    assert named == {"q_proj": "attention", "down_proj": "MLP"}
    for module in ("h.0.attn.c_proj", "block.0.SelfAttention.o", "encoder.layer.0.attention.output.dense"):
        assert part_of(module) == "attention"
    for module in ("h.0.mlp.c_proj", "block.0.DenseReluDense.wi", "encoder.layer.0.output.dense"):
        assert part_of(module) == "MLP"
    table = kinds_table(record)
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["q_proj", "down_proj", "attention", "MLP", "all"]
    assert (rows["attention"], rows["MLP"]) == (rows["q_proj"], rows["down_proj"])  # one kind each here
    both = record.mean(lambda row: True)
    assert both is not None
    assert rows["all"][0] == f"{both.value:.4f}"


def test_means_and_separations_are_drawn_over_depth(record: GateRecord) -> None:
    figure = gate_plots.plot_gate_means({"math": record, "code": record})
    assert [axis.get_title() for axis in figure.axes] == ["q_proj", "down_proj"]
    drawn = [container for container in figure.axes[1].containers if container.get_label() == "code"]
    line, _, bars = drawn[0]
    assert list(line.get_ydata()) == pytest.approx([record[1].openness, record[3].openness])
    mean = record.mean(lambda row: row is record[1])
    assert mean is not None
    assert [float(y) for _, y in bars[0].get_segments()[0]] == pytest.approx([mean.low, mean.high])
    assert figure.axes[0].get_ylabel() == "mean gate"
    separations = gate_separation(record, record)
    figure = gate_plots.plot_separation({"math / code": separations})
    line = figure.axes[0].containers[0][0]
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.5])
    assert "apart" in figure.get_suptitle()


def test_heat_map_shows_every_component(record: GateRecord) -> None:
    figure = gate_plots.plot_gate_heatmap(record, title="On math")
    image = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(image, torch.stack([record[1].mean, record[3].mean], 1).numpy())
    assert figure.get_suptitle() == "On math"
