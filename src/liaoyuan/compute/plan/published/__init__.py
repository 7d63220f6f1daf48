"""Training runs that others published: predicted by closed forms, calibrated on few of them, scored on the rest."""
