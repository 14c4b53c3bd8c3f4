"""One judge a stage. They decide whether an answer, a program, a text or a patch is right.

The reward that a verdict earns is decided in the stage.
"""
