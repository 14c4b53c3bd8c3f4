"""Beside the paper: MOPD (Cascade 2), a step in slow motion, decontamination of a data set."""
