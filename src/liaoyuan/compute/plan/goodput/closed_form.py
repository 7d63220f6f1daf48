"""What is known exactly, or nearly, of a job that fails: the formulas that the simulator must agree with.

All times in one unit, say seconds. C: `save`, M: `mean` time between failures, R: `restart`.
"""

import math


def young(save: float, mean: float) -> float:
    """Return the best work between two saves, sqrt(2 C M) (Young 1974, A first order approximation...)."""
    return math.sqrt(2 * save * mean)


def daly(save: float, mean: float, order: int = 3) -> float:
    """Return the best work between two saves (Daly 2006, equations 13 and 37; FGCS 22, pages 303 to 312).

    order: 1 is sqrt(2 C M) - C, 3 the perturbation solution of which Daly shows that it is within 0.2% of the optimum.
    """
    if save >= 2 * mean:
        return mean
    root = math.sqrt(2 * save * mean)
    if order == 1:
        return max(root - save, 0.0)
    ratio = save / (2 * mean)
    return root * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_time(work: float, every: float, save: float, restart: float, mean: float) -> float:
    """Return the expected seconds of a job (Daly 2006, equation 20): exponential failures, in restarts too.

    work: of the job without failures and saves, of which there is one after each `every`, the end included.
    """
    return mean * math.exp(restart / mean) * math.expm1((every + save) / mean) * work / every


def expected_ettr(every: float, save: float, restart: float, mean: float) -> float:
    """Return the share of useful time that a long job has in the limit of rare failures.

    1 - (restart + every / 2) / mean - save / every: the estimate of Kokolis et al. (arXiv 2410.21680, section on ETTR)
    without queueing, with the time that saves hold the job up.
    """
    return 1 - (restart + every / 2) / mean - save / every


def availability(every: float, save: float, restart: float, mean: float) -> float:
    """Return the share of useful time that follows from `expected_time`, whatever the length of the job."""
    return every / (mean * math.exp(restart / mean) * math.expm1((every + save) / mean))
