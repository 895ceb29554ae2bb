"""Run a script as under `accelerate launch --use_fsdp --fsdp_version 2`, but on CPUs, where
Accelerate knows DDP alone.

    torchrun --nproc_per_node 2 tests/helpers/sharded.py examples/train.py …
"""

import runpy
import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

LAYER = "TransformerLayer" if "transformer" in sys.argv else "LlamaDecoderLayer"
init = Accelerator.__init__


def sharding_init(self, *arguments, **keywords):
    init(self, *arguments, **keywords)
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER],
        state_dict_type="SHARDED_STATE_DICT",
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.state.distributed_type = DistributedType.FSDP


Accelerator.__init__ = sharding_init  # in place: it may have been imported already
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
