"""Hashes of some thousands of fixed calls: the proof that a change of the code changed no bit.

``python -m tests.bits`` says how to write hashes down, compare with them, and compare instruction
sets with each other. `draw` makes inputs and `rules` the rules; `attention` and `layers` list the
calls, all of them through the public functions. Nothing here judges whether a result is right.
"""
