"""Beside the paper: MOPD (Cascade 2), joint RL, a step in slow motion, decontamination of data."""
