"""`python -m bench restore`: a prefix brought back from each source beside the same prefix computed.

`command` is the command line, `ranks` drives real ranks as a worker's host does, `sources` times one way to have a
prefix, `released` computes the same for the released models, `report` tables, JSON and plot.
"""
