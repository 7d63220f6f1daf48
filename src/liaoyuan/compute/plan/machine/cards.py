"""What kinds of cards usually give of the makers' figures, for those who have none at hand to calibrate on.

Large products fall short of a card's peak because its clock falls under their load, on newer cards more than on older
ones. The best of any shape, found by search with PyTorch's own products in bf16 (S. Bekman, "Machine Learning
Engineering", compute/accelerator, table "Maximum Achievable Matmul FLOPS", as of 2026): A100 SXM 86.9%, H100 SXM and
H200 80.3%, B200 77.6%; in fp8 H100 70.9%, H200 73.4%, B200 76.3%. Those of a training step have not the best shape
and follow on each other without a rest: `SUSTAINED` of that. TPUs multiply in systolic arrays at a fixed clock; whole
training runs on v5e reach 67% (maxtext, configs/v5e), so the products within must give more. For Ascend there is no
such measurement, which its sigma says.
"""

from dataclasses import dataclass

from liaoyuan.compute.plan.machine.cluster import Accelerator

SUSTAINED = 0.93


@dataclass(frozen=True)
class Card:
    """Of a kind of card: see `profile.ProductRate` and `profile.DeviceProfile` for most.

    share, share8: of large products in bf16 and fp8; sigma: of their logarithm. attention: forward and backward, of
    the products' rate. memory_share: of the memory's bandwidth that a long copy gets. source: in words.
    """

    share: float
    sigma: float
    units: int
    source: str
    share8: float = 0.65
    tile: tuple[int, int, int] = (128, 256, 64)
    least: tuple[int, int] = (64, 32)
    half_tile: float = 12.0
    half_k: float = 64.0
    attention: tuple[float, float] = (0.75, 0.6)
    memory_share: float = 0.88
    call: float = 3e-6
    launch: float = 6e-6
    contention: float = 1.08


FOUND = "products as published measurements of such cards found them"
TPU = Card(
    *(0.85, 0.1, 1, "what training runs on such cards reach"),
    tile=(256, 256, 128),
    least=(16, 128),
    half_tile=0.0,
    half_k=32.0,
    call=1e-6,
    launch=0.5e-6,  # a whole step is one compiled program
)
CARDS = {  # by how the accelerator's name begins
    "A100": Card(0.869 * SUSTAINED, 0.06, 108, FOUND),
    "H100": Card(0.803 * SUSTAINED, 0.07, 132, FOUND, share8=0.709 * SUSTAINED),
    "H200": Card(0.803 * SUSTAINED, 0.07, 132, FOUND, share8=0.734 * SUSTAINED),
    "B200": Card(0.776 * SUSTAINED, 0.08, 148, FOUND, share8=0.763 * SUSTAINED),
    "Ascend-910B": Card(0.72, 0.15, 20, "a guess from whole training runs on such cards", attention=(0.6, 0.5)),
    "Ascend-910C": Card(0.72, 0.15, 40, "a guess from whole training runs on such cards", attention=(0.6, 0.5)),
    "TPU": TPU,
}
OTHERS = {  # by kind of device
    "cpu": Card(
        *(0.6, 0.3, 1, "a guess for any CPU: calibrate instead"),
        tile=(16, 64, 32),
        least=(1, 16),
        half_tile=0.0,
        attention=(0.5, 0.5),
        memory_share=0.6,
        call=5e-6,
        launch=10e-6,
        contention=1.3,
    ),
    "npu": Card(0.7, 0.2, 24, "what cards like it usually give", attention=(0.6, 0.5)),
    "xla": TPU,
}
USUAL = Card(0.72, 0.12, 120, "what cards like it usually give")


def card_of(accelerator: Accelerator) -> Card:
    """Return what cards of this name usually give, or else cards of its kind of device."""
    known = sorted((name for name in CARDS if accelerator.name.startswith(name)), key=len)
    return CARDS[known[-1]] if known else OTHERS.get(accelerator.device, USUAL)
