"""A stand-in for a Kubernetes API server, with a toy kubelet and a toy proxy, for tests on one machine.

`cluster.StandIn` is all of it: `objects` keeps objects with versions and watches, `server` answers Helm, kubectl and
clients, `controllers` makes pods of Deployments and EndpointSlices of Services, `kubelet` starts each pod's own command
as a local process, `proxy` lets clients reach Services. It is no Kubernetes: see tests/cluster/README.md for what an
installation into it shows and what it does not.
"""
