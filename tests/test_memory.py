"""Large temporaries cost no page faults once they were used."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from sae_experiments import memory
if sys.argv[1] == "keep":
    assert memory.keep()
x = torch.ones(1 << 24)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = torch.relu(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# It takes some calls until blocks of the right size are at hand.
early, late = [faults() for _ in range(24)], [faults() for _ in range(8)]
print(sum(late) // len(late))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_large_temporaries_cost_no_page_faults_in_the_long_run():
    found = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("keep", "no")
    }
    assert found["keep"] < 50
    assert found["no"] > 10 * max(found["keep"], 1)  # else the setting is not needed here any more
