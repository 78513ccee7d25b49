"""DISeL in a LightningModule: its gates step with a learning rate of their own under any optimizer."""

import lightning
import tiny
import torch
from peft import get_peft_model

import dynalora


class LanguageModel(lightning.LightningModule):
    """A model with an adapter, trained on its own loss."""

    def __init__(self) -> None:
        super().__init__()
        config = dynalora.DiselConfig(r=4, target_modules="all-linear", gate_bias_init=0.0)
        self.model = get_peft_model(tiny.causal_model(), config)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


module = LanguageModel()
layer = next(m for m in module.model.modules() if hasattr(m, "gates"))
bias = layer.parameter("gate_bias", "default")
seen = []  # for every step: the bias before it, and its gradient
bias.register_hook(lambda gradient: seen.append((bias.detach().clone(), gradient.clone())))
trainer = lightning.Trainer(
    accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(module, torch.utils.data.DataLoader(tiny.batches(), batch_size=None))

*_, (before, gradient), (after, _) = seen
multiple = float((before - after).norm() / (0.1 * gradient.norm()))
print("gates' step as a multiple of the optimizer's:", multiple)
assert abs(multiple - 5) < 0.01
assert dynalora.state_report(module)[0].step == 6
