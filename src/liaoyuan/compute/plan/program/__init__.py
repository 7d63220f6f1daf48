"""What a training program does, machine or no machine: a dry run of it, call by call, and many told from few."""
