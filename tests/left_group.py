"""What gloo has left when a rank has left the group; run by tests/test_distributed.py, once for each rank."""

from pathlib import Path

import torch
from torch import nn

from walt.distributed import parallel, process_group, world_size

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        assert world_size() == 2
        module = nn.Linear(3, 1)
        parallel(module, module, "ddp")(torch.ones(2, 3)).sum().backward()
        del module
    print([name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())])
