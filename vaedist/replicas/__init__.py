"""Several runs at once on one device, each equal to itself alone: `run.train` gives the trainer's loop all of them.

What of one run is a number is of replicas a list, and what is a tensor has a first dimension more, [replicas, ...].
"""
