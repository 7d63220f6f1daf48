"""The command line: one file per verb; each imports its room only when it runs, so `--help` is instant."""
