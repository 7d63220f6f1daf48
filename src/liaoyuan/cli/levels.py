"""How levels of difficulty are written on the command line: "2-4", or "3"."""


def read_levels(text: str) -> list[int]:
    """Return the levels that `--levels` names; raises LiaoyuanError if it is written in another way."""
    from liaoyuan.errors import LiaoyuanError

    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise LiaoyuanError(f"--levels {text} must look like 2-4 or 3.")
    return list(range(int(first), int(last or first) + 1))
