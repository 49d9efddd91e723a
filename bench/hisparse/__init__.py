"""HiSparse measured on the CPU engine: requests that fit, steps with nobody spilled, and steps with everybody spilled.

`command` is `python -m bench hisparse`; `worker` a scheduler over a real rank in this process; `fits`, `resident` and
`spilled` the three measurements; `trace` records operations.
"""
