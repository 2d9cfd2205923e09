"""Are other kernels in force? `make portable` asks before it runs the lessons with them.

    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ... python -m tests.kernels

computes a matrix product and an exponential here, in float32 and in the lessons' float64, and once
more in a process without these variables. Where the bits are the same, running the lessons would
show nothing: that is said, and the exit status is 2.
"""

import hashlib
import json
import os
import subprocess
import sys

import torch

VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


def bits() -> dict[str, str]:
    """The digest of the bits of each computation, on one thread."""
    torch.set_num_threads(1)
    drawn = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("float32", "float64"):
        x = drawn.to(getattr(torch, name))
        found |= {f"{name} product": x @ x.T, f"{name} exponential": x.exp()}
    return {name: hashlib.sha256(y.numpy().tobytes()).hexdigest() for name, y in found.items()}


def bits_without() -> dict[str, str]:
    """The same, computed by a process that does not have the variables."""
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "tests.kernels", "--bits"]
    ran = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def main() -> int:
    """Prints what it found; 0 if all bits differ, 2 if some do not."""
    if sys.argv[1:] == ["--bits"]:
        print(json.dumps(bits()))
        return 0
    here, plain = bits(), bits_without()
    same = [name for name in here if here[name] == plain[name]]
    if same:
        print(f"{' and '.join(same)}: the same bits as without {', '.join(VARIABLES)}.")
        print("Either they are not set, or this processor and this torch do not obey them (on ARM")
        print("there is no MKL): running the lessons with them would show nothing.")
        return 2
    print(f"other kernels are in force: other bits in {', '.join(here)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
