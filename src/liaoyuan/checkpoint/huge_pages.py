"""Where the weights of a model lie in a CPU's memory.

torch asks the kernel for huge pages for tensors of 2 MiB and more, each of which begins at one: the last part of a
weight is left to small pages, and so are all that are smaller. Those are read more slowly, since the machine's own
reading ahead ends with a page.
"""

import torch
from torch import Tensor

SMALL = 2**23  # bytes of a weight: a larger one loses little
TOGETHER = 2**26  # bytes that small weights take together, and give back together; what is not used is no memory yet
LINE = 64  # bytes


class Together:
    """Memory for weights on `device`, not filled: small ones lie side by side."""

    def __init__(self, device: torch.device | str) -> None:
        self._device, self._memory, self._used = torch.device(device), torch.empty(0, dtype=torch.uint8), 0

    def empty(self, like: Tensor) -> Tensor:
        """Return memory for a tensor of that shape and dtype."""
        if self._device.type != "cpu" or like.nbytes >= SMALL:
            return torch.empty_like(like, device=self._device)
        if self._used + like.nbytes > len(self._memory):
            self._memory, self._used = torch.empty(TOGETHER, dtype=torch.uint8), 0
        place = self._memory[self._used : self._used + like.nbytes]
        self._used += -(-like.nbytes // LINE) * LINE
        return place.view(like.dtype).view(like.shape)
