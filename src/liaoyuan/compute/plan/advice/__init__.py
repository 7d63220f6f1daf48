"""What one can train on the cards one has, and what to buy for what one wants to train, in so many days.

Many sizes are looked at by formulas; a few get whole predictions, and what these say of the formulas decides which size
is next. Layouts are those of the usual kinds. Failures are part of the days.
"""

from liaoyuan.compute.plan.advice.buy import to_buy
from liaoyuan.compute.plan.advice.largest import Wish, family, largest
from liaoyuan.compute.plan.advice.outcome import Asker, Outcome

__all__ = ["Asker", "Outcome", "Wish", "family", "largest", "to_buy"]
