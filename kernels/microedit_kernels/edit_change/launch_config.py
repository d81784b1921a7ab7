"""Block sizes of the edit change's two kernels."""

from dataclasses import dataclass, replace

MAX_ROW_BLOCK = 128
MIN_ROW_BLOCK = 16
MIN_BLOCK_D = 32
MAX_D_SPLITS = 8


@dataclass(frozen=True)
class LaunchConfig:
    """How both products are cut; `GroupedSets` fixes the latents of a program.

    rows: tokens of a block, in both.
    acts_d: depth of a step of the first product; acts_splits: programs that share its d.
    delta_d: columns of a program of the second product; delta_latents: depth of its steps, a
        divisor of the sets' `tile`.
    latents_first: weights are the left operand, so that few tokens still fill the tensor cores.
    overlap: the second kernel is set up while the first one runs; needs Hopper or later.
    """

    rows: int
    acts_d: int
    acts_splits: int
    acts_warps: int
    acts_stages: int
    delta_d: int
    delta_latents: int
    delta_warps: int
    delta_stages: int
    latents_first: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        if not MIN_ROW_BLOCK <= self.rows <= MAX_ROW_BLOCK:
            raise ValueError(f"a block of {self.rows} rows is not in 16 to {MAX_ROW_BLOCK}")
        if self.delta_d < MIN_BLOCK_D or not 1 <= self.acts_splits <= MAX_D_SPLITS:
            raise ValueError(f"delta_d is below {MIN_BLOCK_D} or more than {MAX_D_SPLITS} splits")


# What a search for the fastest tries: cuts for `GroupedSets.join`, as (tile, part), and configs for
# them. All compile for Hopper at d = 4096 in bf16 without a spill (Triton 3.6, 3.9).
CUTS = [(64, 1280), (64, 640), (64, 2560), (32, 1280), (128, 1280)]
CANDIDATES = [
    LaunchConfig(16, 128, 4, 4, 4, 128, 64, 4, 4),
    LaunchConfig(16, 128, 2, 4, 5, 128, 64, 4, 5),
    LaunchConfig(16, 128, 2, 8, 5, 128, 64, 8, 4),
    LaunchConfig(16, 128, 1, 4, 6, 64, 64, 4, 5),
    LaunchConfig(16, 128, 4, 4, 4, 128, 64, 4, 4, latents_first=True),
    LaunchConfig(16, 256, 2, 8, 3, 256, 32, 8, 4, latents_first=True),
    LaunchConfig(32, 128, 4, 4, 4, 128, 64, 4, 4),
    LaunchConfig(32, 128, 4, 4, 4, 128, 64, 8, 4, latents_first=True),
    LaunchConfig(64, 64, 4, 4, 4, 128, 64, 8, 4),
    LaunchConfig(64, 64, 4, 8, 5, 128, 64, 8, 4, latents_first=True),
    LaunchConfig(64, 64, 2, 8, 6, 128, 32, 8, 5, latents_first=True),
    LaunchConfig(64, 128, 4, 8, 3, 64, 64, 4, 4),
    LaunchConfig(64, 128, 2, 8, 3, 64, 64, 4, 5),
    LaunchConfig(64, 128, 2, 8, 4, 64, 64, 8, 5, latents_first=True),
    LaunchConfig(64, 64, 1, 4, 6, 64, 64, 8, 4),
    LaunchConfig(64, 128, 1, 8, 5, 256, 32, 8, 4, latents_first=True),
    LaunchConfig(128, 64, 4, 8, 4, 128, 64, 8, 3),
    LaunchConfig(128, 64, 2, 8, 4, 128, 64, 8, 4),
]


def launch_config(rows: int, max_latents: int, d: int, element_size: int = 2) -> LaunchConfig:
    """The block sizes for at most `rows` active rows and sets of at most `max_latents`.

    Args:
        element_size: bytes of the widest of the stream and the weights; 4 halves the steps, so
            that they fit the shared memory.
    """
    if rows <= 16:
        config = LaunchConfig(16, 128, 4, 4, 4, 128, 64, 4, 4)
    elif rows <= 32:
        config = LaunchConfig(32, 128, 4, 4, 4, 128, 64, 4, 4)
    elif rows <= 64:
        config = LaunchConfig(64, 64, 4, 4, 4, 128, 64, 8, 4)
    else:
        config = LaunchConfig(128, 64, 4, 8, 4, 128, 64, 8, 3)
    if max_latents * d < 1 << 20:
        config = replace(config, acts_splits=1)
    if element_size == 4:
        config = replace(config, acts_d=config.acts_d // 2, delta_latents=config.delta_latents // 2)
    return config
