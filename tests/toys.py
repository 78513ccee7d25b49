"""Models small enough for a CPU test, built from a seed without any network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64


class MLP(nn.Module):
    """Two adapted linear layers of different shapes and a head; ``forward(x)`` gives the logits."""

    def __init__(self, width_in: int = 12, width: int = 20, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, width)
        self.act = nn.Tanh()
        self.second = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        return self.head(self.act(self.second(self.act(self.first(x)))))


def mlp() -> nn.Module:
    torch.manual_seed(11)
    return MLP()


def llama(width: int = 32) -> nn.Module:
    """Grouped-query attention, so that q_proj and v_proj differ in shape; ``width`` must be a multiple of 8."""
    torch.manual_seed(12)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    torch.manual_seed(13)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(14)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def tokens(batch: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    """Token ids (batch, length), none of them a special token."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _vector_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(6, 12, generator=generator)}


def _token_batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed=seed)}


@dataclass(frozen=True)
class Toy:
    """A base model with what a test must know about it."""

    name: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    batch: Callable[[int], dict[str, Tensor]]
    task_type: str | None = None
    layer_count: int = 0
    """Numbered blocks (``layers.0`` …); 0 where the model has none."""
    extra_modules: tuple[str, ...] = ()
    """Modules a user would train in full."""

    def logits(self, model: nn.Module, seed: int = 5) -> Tensor:
        """Evaluation-mode logits on a fixed batch."""
        training = model.training
        model.eval()
        with torch.no_grad():
            result = output_of(model(**self.batch(seed)))
        model.train(training)
        return result

    def loss(self, model: nn.Module, seed: int = 5) -> Tensor:
        """A task loss on a fixed batch, in the model's present mode."""
        logits = output_of(model(**self.batch(seed))).float()
        labels = torch.arange(logits[..., 0].numel()) % logits.shape[-1]
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels)


def output_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("mlp", mlp, ("first", "second"), _vector_batch, extra_modules=("head",)),
        Toy("llama", llama, ("q_proj", "v_proj", "down_proj"), _token_batch, "CAUSAL_LM", 2, ("lm_head",)),
        Toy("gpt2", gpt2, ("c_attn", "c_fc"), _token_batch, "CAUSAL_LM", 2, ("lm_head",)),
        Toy("bert", bert, ("query", "value"), _token_batch, "SEQ_CLS", 2, ("classifier",)),
    )
}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    """The same keys, dtypes and bits."""
    now = module.state_dict()
    assert sorted(now) == sorted(before)
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


def clone(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
