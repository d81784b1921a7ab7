"""How far a share that was counted may be from the true one."""

import math

# Two-sided 95% of the normal distribution.
Z95 = 1.959964


def wilson_interval(count: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, [low, high]; (0, 1) of nothing (Wilson, 1927)."""
    if not total:
        return 0.0, 1.0
    share, doubt = count / total, z * z / total
    spread = z * math.sqrt(share * (1 - share) / total + doubt / (4 * total))
    low, high = (share + doubt / 2 + sign * spread for sign in (-1, 1))
    return max(0.0, low / (1 + doubt)), min(1.0, high / (1 + doubt))
