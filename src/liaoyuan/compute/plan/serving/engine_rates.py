"""What a step of the engine costs beside the model's own work, and how that work is priced too high or too low there.

Measured by `measured.py` on the machine at hand; else assumed, wide.
"""

from pathlib import Path

from liaoyuan.compute.plan.machine.profile import Figure
from liaoyuan.config import Config
from liaoyuan.errors import LiaoyuanError
from liaoyuan.rundir import write_atomic

FIGURES = ("step", "sequence", "products", "attention", "unexplained")


class EngineRates(Config):
    """Of one process that leads an engine.

    step: seconds of any step: planning, drawing, telling. sequence: further ones for each sequence in it. products,
    attention: by what the prices of these are to be multiplied. unexplained: spread of what nothing here explains, over
    a whole run (the median is 1).
    """

    step: Figure = Figure(median=5e-4, sigma=0.4)
    sequence: Figure = Figure(median=4e-6, sigma=0.4)
    products: Figure = Figure(median=1.0, sigma=0.1)
    attention: Figure = Figure(median=1.0, sigma=0.1)
    unexplained: Figure = Figure(median=1.0, sigma=0.1)
    rests_on: str = "what such engines usually take beside the model"

    def figures(self) -> dict[str, Figure]:
        """Return every uncertain figure by a name, such as "engine.step"."""
        return {f"engine.{name}": getattr(self, name) for name in FIGURES}

    def moved(self, name: str, z: float) -> "EngineRates":
        """Return them with one figure `z` standard deviations from its median."""
        key = name.removeprefix("engine.")
        return self.model_copy(update={key: getattr(self, key).at(z)})

    def save(self, path: Path) -> None:
        """Write them as JSON, whole or not at all; raises LiaoyuanError if they cannot be written."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")


def read_rates(path: Path) -> EngineRates:
    """Return the rates of a JSON file.

    Raises:
        LiaoyuanError: there is none, or it is wrong.
    """
    try:
        return EngineRates.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LiaoyuanError(f"There are no rates {path}: `liaoyuan plan serve-rates` measures them.") from error
    except ValueError as error:
        raise LiaoyuanError(f"{path} has no rates of an engine: {error}") from error
