"""A frozen teacher whose layers are shared out: each process holds its part, and gathers a layer when it runs."""

from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard_teacher(teacher: Any, device: torch.device) -> None:
    """Shard the decoder layers of a causal model over all processes (FSDP2, in the model's own dtype).

    Embedding, norm and output layer stay whole: the two ends are often one tensor, and the output layer runs on a few
    rows at a time, for each of which it would be gathered.

    Args:
        teacher: with the same weights on every process, anywhere; its layers come to the device.
        device: of this process.

    Raises:
        RuntimeError: outside a distributed run.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("`shard_teacher` shares the teacher over processes: start them with `accelerate launch`.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    decoder = teacher.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = {weight for name, weight in decoder.named_parameters() if not name.startswith("layers.")}
    # Under one root the next layer is gathered while one runs.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


__all__ = ["shard_teacher"]
