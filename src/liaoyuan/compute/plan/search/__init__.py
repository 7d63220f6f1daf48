"""The best layout of a job on a machine: thousands by formulas, the most promising by the whole prediction."""
