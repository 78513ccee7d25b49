"""The same mathematics on a CUDA device; run with `make test-gpu`."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from dynalora import DiraConfig
from tests.matrix.rows import ROWS, Row
from tests.toys import TOYS, tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LLAMA = TOYS["llama"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=str)
def test_outputs_and_gradients_equal_the_cpus(row: Row, dtype: torch.dtype, tolerance: float) -> None:
    results: list[dict[str, torch.Tensor]] = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = row.adapt(LLAMA, init_weights=False).to(device)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype if device == DEVICE else torch.float32)
        ids = tokens(2, 9).to(device)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": output.logits.detach().float().cpu(), **found})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, name


@pytest.mark.parametrize("fused", [False, True], ids=["scaled outside", "scaled in the kernel"])
def test_a_scaled_step_adds_the_same_penalty(fused: bool) -> None:
    """λ(t)·∂penalty must not be scaled with the loss, wherever the optimizer takes the scale out."""

    def train(scaler: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(
            LLAMA.build(), DiraConfig(target_modules=["q_proj"], penalty_weight=0.1, total_steps=4, init_weights=False)
        ).to(DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        ids = tokens(2, 9).to(DEVICE)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    plain = train(torch.amp.GradScaler(DEVICE, enabled=False))
    scaled = train(torch.amp.GradScaler(DEVICE, init_scale=1024.0))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
