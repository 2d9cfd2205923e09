"""Are other kernels in force? `make portable` asks before it runs the lessons with them.

    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ... python -m tests.kernels

computes a matrix product and an exponential in float32 here, and once more in a process without
these variables. Where the bits are the same, running the lessons here would show nothing: that is
said, and the exit status is 2.
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
    x = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    found = {"product": x @ x.T, "exponential": x.exp()}
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
        print(f"the float32 {' and the float32 '.join(same)}: the same bits as without", end=" ")
        print(f"{', '.join(VARIABLES)}. Either they are not set, or this processor and this torch")
        print("do not obey them: running the lessons with them would show nothing.")
        return 2
    print("other kernels are in force: in float32 a product and an exponential have other bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
