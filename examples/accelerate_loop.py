"""DiRA in a loop with Accelerate: micro-batches are no steps; the length of the run is given."""

import tiny
import torch
from accelerate import Accelerator
from peft import get_peft_model

import dynalora

batches = tiny.batches(count=8)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
steps = len(batches) // 2
config = dynalora.DiraConfig(r=8, target_modules="all-linear", penalty_weight=0.01, total_steps=steps)
model = get_peft_model(tiny.causal_model(), config)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(batches, batch_size=None))
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

[report] = dynalora.state_report(accelerator.unwrap_model(model))
print(report)
assert (report.step, report.total_steps) == (steps, steps)
assert report.details["dira_penalty_weight"] < config.penalty_weight, "it has decayed"
