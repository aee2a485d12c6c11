"""What a client sees behind a buffer that paces tokens: gaps after pacing, and stalls that pacing cannot hide.

A scheduler that skips steps of a request (Kairos, arXiv 2605.02329, section 4) sends its tokens in bursts. A buffer at
the egress or in the client shows them no closer together than ``pace_s``, so tokens in hand bridge the steps left out.
The live gateway has such a buffer around moves only (``live/playout.py``).
"""

from __future__ import annotations

import numpy as np

from penstock.workload.trace import F64


def paced(times_s: F64, pace_s: float) -> F64:
    """When each token of one request is shown.

    Parameters
    ----------
    times_s : float64[n]
        When each token came, ascending.
    pace_s : float
        Least time between two shown tokens, seconds; 0 shows each as it comes.

    Returns
    -------
    float64[n]
        ``shown[0] = times[0]``, ``shown[i] = max(times[i], shown[i - 1] + pace)``.
    """
    # shown[i] - i * pace is the running maximum of times[i] - i * pace.
    steps = np.arange(len(times_s)) * pace_s
    shown: F64 = np.maximum.accumulate(times_s - steps) + steps
    return shown


def paced_gaps(times_s: F64, pace_s: float) -> F64:
    """Time between shown tokens, seconds, float64[max(n - 1, 0)]; see :func:`paced`."""
    return np.diff(paced(times_s, pace_s))


def stalls(times_s: F64, pace_s: float) -> F64:
    """How much each shown gap exceeds the pace, seconds, float64[max(n - 1, 0)]; 0 where the buffer hid the wait."""
    late: F64 = np.maximum(paced_gaps(times_s, pace_s) - pace_s, 0.0)
    # Sums of the pace round: what is left of that is no stall.
    late[late < 1e-9] = 0.0
    return late
