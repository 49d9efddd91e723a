"""`rorqual bench scale`: rules that set replicas, raced over loads on a simulated fleet of prefill and decode workers.

`command` is the command line, `rules` who races (`ours` the planner), `race` one run and its figures, `world` the fleet
on virtual time, `steps` what happens between two looks, `workloads` what arrives, `report` table, verdicts and plots.
"""
