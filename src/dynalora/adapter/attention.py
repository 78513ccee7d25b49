"""The projections of `nn.MultiheadAttention`, each adapted as a linear layer of its own.

The module reads the matrices of its projections and calls no layers: those of queries, keys and values lie in one
parameter (or in three, where keys or values have another width), that of the output in a layer whose weight is read.
`AdaptedAttention` has a linear layer for each (`AttentionMatrix`), which adapters wrap as any other, and computes with
them what the module documents. No weight is put together in the forward pass, so gates, and whatever else depends on
the input, take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from dynalora.adapter.parts import Parted, PartMatrix, acts, of_part
from dynalora.errors import ConfigError

#: The projections: of queries, keys and values, and of the result.
PROJECTIONS = ("q", "k", "v", "out")


class TakingPart(torch.Tensor):
    """A tensor that is asked before torch's functions compute with it.

    In evaluation, `nn.TransformerEncoderLayer` computes with the weights that it finds and calls none of its layers. It
    does not where one is a tensor that takes part in torch's functions.
    """


class AttentionMatrix(PartMatrix):
    """One projection of an `nn.MultiheadAttention` as a linear layer.

    Attributes:
        projection: Which; one of `PROJECTIONS`.
    """

    def __init__(self, attention: nn.Module, projection: str) -> None:
        super().__init__(attention)
        self.projection = projection

    @property
    def weight(self) -> torch.Tensor:
        """The projection's matrix, (out, in): a parameter, or a view of one."""
        if self.projection == "out":
            return cast(torch.Tensor, self.owner.out_proj.weight)
        if self.owner.in_proj_weight is None:
            return cast(torch.Tensor, getattr(self.owner, f"{self.projection}_proj_weight"))
        return self._third(self.owner.in_proj_weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The projection's bias, (out), or None."""
        if self.projection == "out":
            return cast("torch.Tensor | None", self.owner.out_proj.bias)
        return None if self.owner.in_proj_bias is None else self._third(self.owner.in_proj_bias)

    @property
    def bias_name(self) -> str:  # type: ignore[override]
        """That of the output is a parameter; those of queries, keys and values lie in one."""
        return "out_proj.bias" if self.projection == "out" else ""

    def _third(self, joined: torch.Tensor) -> torch.Tensor:
        size = self.owner.embed_dim
        return joined.narrow(0, PROJECTIONS.index(self.projection) * size, size)

    def extra_repr(self) -> str:
        """The projection, for `print(model)`."""
        return self.projection


class AdaptedAttention(Parted):
    """An `nn.MultiheadAttention` of which some projections are adapted.

    Attributes:
        projections: The four layers by `PROJECTIONS`, adapted or not.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.projections = nn.ModuleDict({name: AttentionMatrix(base_layer, name) for name in PROJECTIONS})

    def parts(self) -> Iterator[nn.Module]:
        """The four layers."""
        yield from self.projections.values()

    @property
    def in_proj_weight(self) -> Any:
        """The module's own parameter; `nn.TransformerEncoderLayer` must not compute with it while an adapter acts."""
        self.take_back_if_disabled()
        weight: Any = self.base_layer.in_proj_weight
        return weight.as_subclass(TakingPart) if weight is not None and any(map(acts, self.parts())) else weight

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `nn.MultiheadAttention` computes, with its projections' adapters; arguments and result are its own.

        `adapter_names` are the adapters of the rows in a mixed batch; see `AdapterLayer.forward`.

        Raises:
            ConfigError: `is_causal=True` without the mask that it is a hint for.
        """
        self.take_back_if_disabled()
        base: Any = self.base_layer
        if not any(acts(part, adapter_names) for part in self.parts()):
            result: tuple[torch.Tensor, torch.Tensor | None] = base(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return result
        if is_causal and attn_mask is None:
            raise ConfigError(
                "nn.MultiheadAttention: is_causal=True is a hint on attn_mask, and there is none; give both."
            )
        batched = query.dim() == 3
        turned = batched and not base.batch_first
        q, k, v = (
            of_part(self.projections[name], x.transpose(0, 1) if turned else x if batched else x[None], adapter_names)
            for name, x in zip(PROJECTIONS, (query, key, value), strict=False)
        )
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._mask(attn_mask, key_padding_mask, q.dtype)
        if base.bias_k is not None:
            more = ((k, base.bias_k), (v, base.bias_v))
            k, v = (torch.cat([x, bias.to(x).expand(len(x), 1, -1)], dim=1) for x, bias in more)
        if base.add_zero_attn:
            k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:  # what is added to keys and values is seen from everywhere
            mask = nn.functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (x.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = base.dropout if base.training else 0.0
        weights = None
        if need_weights:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            weights = nn.functional.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, p, is_causal=hint)
        y = of_part(self.projections["out"], mixed.transpose(1, 2).flatten(2), adapter_names)
        return (y.transpose(0, 1) if turned else y if batched else y[0]), weights

    def _mask(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """What is added to the scores, to be broadcast to (batch, heads, targets, sources); None for nothing."""
        masks = []
        if attn_mask is not None:
            by_head = attn_mask.dim() == 3  # (batch · heads, targets, sources)
            masks.append(attn_mask.unflatten(0, (-1, self.base_layer.num_heads)) if by_head else attn_mask[None, None])
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        added: torch.Tensor | None = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
            added = mask.to(dtype) if added is None else added + mask.to(dtype)
        return added


def is_attention(module: nn.Module | None) -> bool:
    """Whether a module is torch's own `nn.MultiheadAttention`, with weights that are its own, adapted or not."""
    base = module.base_layer if isinstance(module, AdaptedAttention) else module
    return type(base) is nn.MultiheadAttention
