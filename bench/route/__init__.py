"""`rorqual bench route`: placement policies raced over a trace, on the real index and simulated workers.

`command` is the command line, `policies` who races, `fleet` one run on virtual time, `worker` a simulated worker,
`picture` what the router sees, `trace` what arrives, `report` tables, JSON and plots.
"""
