"""Read when you need it: flags, ranks, logs, data sets, packing, checkpoints, how a run ends, the memory and time plan."""
