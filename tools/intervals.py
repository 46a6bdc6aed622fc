"""The uncertainty of every table: how much would the mean change with other seeds?

All seeds of a method have the same held-out goals, so whole seeds are resampled, not goals. With
fewer than five seeds an interval would be a guess: tables show every seed's value instead.
"""
import numpy as np

FEW = 5  # fewer seeds than that are shown one by one


def interval(values, resamples: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean over seeds: percentiles of means of resampled seeds (bootstrap)."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def spread(values, digits: int) -> str:
    """Mean with its interval "[low, high]", or with every seed's value "(a, b, c)" if few."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    if len(values) < FEW:
        return f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"
    low, high = interval(values)
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"
