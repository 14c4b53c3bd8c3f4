"""Plumbing of all stages, to be read when you need it.

flags        the command line of a script
common       ranks, sharding, collectives
logs         what a run prints and writes at every step
trackers     the metrics to trackio, wandb or tensorboard
progress     bars, and a line a minute where nothing else is printed
health       is the run dead? one sentence that names the cause
guard        how a run ends, and what it says then
data         data sets, and the prompts of an RL stage
packing      rollouts into packed batches
checkpoint   what a run saves and resumes from
plan         memory and time of a run, estimated before it starts
"""
