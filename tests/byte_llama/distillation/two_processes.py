"""What each process of test_two_processes.py runs: a few steps of distillation; the first writes its log."""

import json
import sys
from pathlib import Path

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from byte_llama.distillation import Recipe, distill

# Accelerate leaves FSDP out on CPU, though PyTorch's works there: switch it on as accelerate does on GPUs.
original = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    fresh = not self._shared_state
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh:
        self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()
        # Every later state takes its type from the partial one.
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp

recipe, log, resume = sys.argv[1:]
trainer = distill(Recipe.from_file(recipe), resume=resume == "resume")
sharded = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
layers = trainer.teacher.get_decoder().layers
teacher_sharded = all(isinstance(parameter, DTensor) for parameter in layers.parameters())
if trainer.is_world_process_zero():
    result = {"history": trainer.state.log_history, "sharded": sharded, "teacher_sharded": teacher_sharded}
    Path(log).write_text(json.dumps(result))
