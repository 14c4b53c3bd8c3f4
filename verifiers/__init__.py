"""One judge a stage. They decide whether an answer, a program, a text or a patch is right; what that is worth stands in the stage."""
