"""A process's first elementwise functions on several threads give what its later ones give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Forked from a process that has computed nothing, as each command is a process of its own; the product starts threads.
CHILDREN = """
import os, sys
import torch
from cartilha.machine.cpu import settle_cpu_functions

different = 0
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        settle_cpu_functions()
        values = torch.rand(895, 259, generator=torch.Generator().manual_seed(number))
        values @ values.T
        same = [torch.equal(getattr(torch, name)(values), getattr(torch, name)(values)) for name in FUNCTIONS]
        os._exit(0 if all(same) else 1)
    different += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
print(different)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here, whose fault it is")
def test_the_first_call_of_a_function_on_two_threads_has_all_its_digits():
    script = CHILDREN.replace("FUNCTIONS", repr(("exp", "log", "tanh", "sin", "cos", "sqrt", "erf")))
    ended = subprocess.run([sys.executable, "-c", script, "80"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == 0
