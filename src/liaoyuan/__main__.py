"""`python -m liaoyuan` is the command `liaoyuan` (torchrun starts it this way)."""

from liaoyuan.cli.main import main

if __name__ == "__main__":
    main()
