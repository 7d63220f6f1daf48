"""Run by `test_compare.py` in a process of its own: the CPU against a device that torch learnt about only now."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import stand_in_device
from liaoyuan.compute.compare import Way, compare
from liaoyuan.compute.subject import random_stream
from liaoyuan.device import Device


def main(folder: Path) -> None:
    device = Device(stand_in_device.NAME, 0)
    found = compare(
        Way(folder), Way(folder, device), lambda model, _, *size: random_stream(model.config.vocab_size, *size), 2, 32
    )
    ours = [row for row in found.rows if not row.operator.startswith("aten.")]
    facts = {
        "differs": found.differs,
        "worst": max(row.difference.relative for row in found.rows),
        "operators": sorted({row.operator for row in ours if not row.only}),
        "alone": [row.alone.relative for row in ours if row.alone],
        "compared": len(ours),
        "ran_there": len(stand_in_device.SEEN),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
