"""What each of several processes on CPU does in test_many_devices.py; the first writes what came out.

python -m torch.distributed.run --standalone --nproc_per_node=2 device_process.py HOW FOLDER OUTPUT
"""

import sys

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import byte_llama  # noqa: F401  makes its architectures known to the Auto classes
import evabyte  # noqa: F401  likewise

GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
PLANS = {
    "one": lambda: {},
    "tensor": lambda: {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")},
    "pipeline": lambda: {"distributed_config": DistributedConfig(pp_size=dist.get_world_size())},
    "sharded": lambda: {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(how: str, folder: str) -> dict:
    """Logits, texts and gradients of a model that is loaded in this way, from inputs saved beside its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, **PLANS[how]())
    ids = torch.load(f"{folder}/ids.pt")
    result = {"held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())}
    with torch.no_grad():
        result["logits"] = whole(model(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    prompts = {"input_ids": ids, "attention_mask": mask, "synced_gpus": how == "sharded"}
    result["text"] = model.generate(**prompts, **GREEDY)
    if how != "pipeline":
        result["multibyte"] = model.multi_byte_generate(
            ids, attention_mask=mask, synced_gpus=how == "sharded", **GREEDY
        )
        loss = model(ids, labels=ids).loss
        loss.backward()
        result["loss"] = loss.detach()
        result["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = everything(*sys.argv[1:3])
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[3])
    dist.destroy_process_group()
