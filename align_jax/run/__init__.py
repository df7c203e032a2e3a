"""What surrounds a run, in the order a run meets it: multihost (processes), workdir (what a run
is), init_from (first weights), checkpoint, trained (a checkpoint as a model), metrics and progress
(what it says), plots.
"""
