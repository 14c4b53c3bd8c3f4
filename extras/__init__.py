"""Beside the paper: distillation from several teachers (Cascade 2), decontamination of a data set."""
