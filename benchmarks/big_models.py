"""What adapters take on big models: made without weights, and trained where that fits, beside what is computed.

python benchmarks/big_models.py meta 7B 70B   # every method at r = 16 on all linear layers, on the meta device
python benchmarks/big_models.py train 1B dira disel pedyra   # bytes counted in real steps, and those computed
python benchmarks/big_models.py start 1B 1 4   # work space of starts from the weights, with so many of its blocks
python benchmarks/big_models.py train 7B --device cuda   # the same on a GPU, with what its allocator says it holds
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import peft
import torch
import transformers

from dynalora.lab.configs import adapter_config
from dynalora.lab.costs import amount, cost_of
from dynalora.lab.machine import forget_peak, peak, resident
from dynalora.lab.report import Table, markdown_table
from dynalora.methods import method_names

# Shapes of Llama 2 and 3: width, MLP, layers, heads, key and value heads, vocabulary.
SIZES = {
    "tiny": (256, 1024, 4, 4, 4, 1024),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
# Starts that read the weights: the smallest singular triplets, and the largest.
STARTS: dict[str, dict[str, Any]] = {"dislora": {}, "milora": {}, "sorsa": {}, "pedyra": {"init_weights": "pissa"}}
TOKENS = 32
STEPS = 2


def config_of(size: str) -> transformers.LlamaConfig:
    """The shapes of a size."""
    width, mlp, layers, heads, pairs, vocabulary = SIZES[size]
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=size in ("1B", "tiny"),
    )  # fmt: skip


def on_meta(size: str, methods: list[str]) -> Table:
    """Seconds to make an adapter, and by how much this process has grown, model left out."""
    rows: list[list[Any]] = []
    for method in methods:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config_of(size))
            gc.collect()
            before, began = resident(), time.perf_counter()
            adapted = peft.get_peft_model(model, adapter_config(method, r=16, options={"total_steps": 1000}))
        seconds, grown = time.perf_counter() - began, resident() - before
        assert all(parameter.is_meta for parameter in adapted.parameters())
        rows.append([method, adapted.get_nb_trainable_parameters()[0], f"{seconds:.1f} s", amount(max(0, grown))])
        del model, adapted
    return Table([f"{size} on the meta device", "trained parameters", "time", "memory"], rows)


def started(size: str, blocks: int, method: str) -> list[Any]:
    """By how much this process grew at most while an adapter was made, and what of it is left."""
    torch.manual_seed(0)
    config = config_of(size)
    config.num_hidden_layers = blocks
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gc.collect()
    forget_peak()
    before, began = resident(), time.perf_counter()
    adapted = peft.get_peft_model(
        model, adapter_config(method, r=16, options={"total_steps": 1000, **STARTS.get(method, {})})
    )
    seconds, most_held = time.perf_counter() - began, (peak() or 0) - before
    gc.collect()
    left = resident() - before
    own = sum(tensor.nbytes for name, tensor in adapted.state_dict().items() if f"{method}_" in name)
    return [blocks, method, amount(most_held), amount(max(0, left)), amount(own), f"{seconds:.0f} s"]


def trained(size: str, method: str, device: torch.device) -> list[Any]:
    """Bytes of a model with random weights in bfloat16 in training, as counted and as computed."""
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16)
        config = adapter_config(method, r=16, options={} if method == "lora" else {"total_steps": 1000})
    cost = cost_of(model, config, dtype=torch.bfloat16)
    base = sum(parameter.nbytes for parameter in model.parameters())
    others = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    forget_most(device)
    before, began = held(device), time.perf_counter()
    adapted = peft.get_peft_model(model, config).train()
    start, making = most(device) - before, time.perf_counter() - began
    own = [tensor for tensor in (*adapted.parameters(), *adapted.buffers()) if id(tensor) not in others]
    adapter = sum(tensor.nbytes for tensor in own)
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    forget_most(device)
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = torch.randint(3, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(step)).to(device)
        began = time.perf_counter()
        adapted(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        float(weights[0].detach().flatten()[0])  # waits for the device
        seconds = time.perf_counter() - began
    gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    state = sum(tensor.nbytes for entry in optimizer.state.values() for tensor in entry.values() if tensor.numel() > 1)
    parts = ((base, cost.base), (adapter, cost.adapter), (gradients, cost.gradients), (state, cost.optimizer))
    # A GPU's allocator knows what is held; a CPU's process holds the libraries, too, so the parts are added up there.
    together = held(device) if device.type == "cuda" else sum(counted for counted, _ in parts)
    pairs = (*parts, (together, cost.total))
    cells = [f"{amount(counted)} / {amount(computed)}" for counted, computed in pairs]
    return [method, *cells, amount(start), f"{making:.1f} s", amount(most(device)), f"{seconds:.2f} s"]


def held(device: torch.device) -> int:
    """Bytes that are in use now: those that the GPU's allocator gave out; on a CPU all of this process."""
    gc.collect()
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident()


def most(device: torch.device) -> int:
    """The most of them since `forget_most`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak() or 0


def forget_most(device: torch.device) -> None:
    """Begin anew with `most`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def main() -> None:
    """Print one table per size on the meta device, or a size's rows in training, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["meta", "start", "train"])
    parser.add_argument(
        "words", nargs="*", help="sizes for meta; a size and numbers of blocks for start; a size and methods for train"
    )
    parser.add_argument("--device", default="cpu", type=torch.device, help="where train has its weights: cpu or cuda")
    given = parser.parse_args()
    if given.what == "meta":
        for size in given.words or ("7B", "70B"):
            print(markdown_table(on_meta(size, method_names())), flush=True)
        return
    if given.what == "start":
        size, *blocks = given.words or ["1B", "1", "4"]
        columns = [f"blocks of {size}", "start of", "most while it is made", "left of it", "adapter's tensors", "time"]
        rows = [started(size, int(number), method) for method in STARTS for number in blocks]
        print(markdown_table(Table(columns, rows)))
        return
    size, *methods = given.words or ["1B"]
    if given.device.type == "cuda":
        print(torch.cuda.get_device_name(given.device))
        torch.ones(64, 64, device=given.device) @ torch.ones(64, 64, device=given.device)  # cuBLAS takes its work space
    parts = ["base weights", "adapter", "gradients", "AdamW's state", "together"]
    columns = [*parts, "most while it is made", "made in", "most in a step", "step"]
    for index, method in enumerate(methods or ("lora", *method_names())):
        table = markdown_table(Table([f"{size}, counted / computed", *columns], [trained(size, method, given.device)]))
        print("\n".join(table.splitlines()[0 if index == 0 else 2 :]), flush=True)


if __name__ == "__main__":
    main()
