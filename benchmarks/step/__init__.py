"""What learning costs on a processor, against the way the authors' published code does it.

reference.py  that way, written anew from its description: the local update and the two kinds of evaluation
update.py     `fedloge bench step`: the local update of one site
judging.py    `fedloge bench eval`: the evaluation after a round, of the generic model and of all personal ones
problem.py    the federation both work on: images are random, as their content costs nothing
workers.py    a live process for every rung, each told in turn to do its work once

Our side is the product's: a simulated site's `handle`, the simulation's `judge`, with the settings of an experiment
file. Every rung runs on one thread and says what processor time it took; ratios are of two turns next to each other,
so what else the machine does falls on both.
"""
