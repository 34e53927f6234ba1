"""Kernels in processes that were forked from one that has run kernels: what docs/cpu.md says of them."""

from __future__ import annotations

import subprocess
import sys

import found_ops

CODE = """
import os, torch
from torch.utils.data import DataLoader, Dataset
import walt_kernels as wk

torch.set_num_threads(2)
x, weight = torch.randn(1, 16, 5, 32, 32), torch.randn(16, 16, 3, 3, 3)
y = wk.causal_conv3d(x, weight)  # the threads of OpenMP run from here on


class Samples(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return wk.causal_conv3d(x, weight)


for batch in DataLoader(Samples(), num_workers=2):
    assert torch.equal(batch[0], y)

child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(wk.causal_conv3d(x, weight), y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@found_ops.needs_native
def test_workers_of_a_loader_and_children_with_one_thread_run_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
