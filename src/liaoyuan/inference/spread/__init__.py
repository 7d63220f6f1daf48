"""One model over several processes: the first has the engine, the others follow."""
