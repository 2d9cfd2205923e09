"""What a lesson begins with: one call, so that it prints the same numbers on other processors."""

import os
import warnings

THREADS_VARIABLE = "MINIPPO_THREADS"  # how many threads torch gets in a lesson: 1 without it


def set_up() -> None:
    """Double precision, fixed seed and threads, no progress bars, short numbers, one plot style.

    Double precision (float64) is what makes a lesson repeatable: products in single precision
    differ in the last digits from processor to processor. Where two tokens are about equally
    likely, such a digit decides which one is sampled, and every number after it is another one.
    Models that are loaded afterwards are in double precision as well; commands stay in single.
    Raises ValueError if MINIPPO_THREADS is not a whole number above 0.
    """
    given = os.environ.get(THREADS_VARIABLE, "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{THREADS_VARIABLE} is {given!r}; it must be a whole number above 0")
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which torch does
    warnings.filterwarnings("ignore", message="IProgress not found")
    import matplotlib.pyplot as plt
    import torch

    from minippo.plots import COLOURS, STYLES

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_num_threads(int(given))
    torch.set_printoptions(precision=3, sci_mode=False)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25})
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS[:4], linestyle=STYLES)
