"""`rorqual doctor`: looks at a machine, a model, workers, routers, a store and a cluster, and says what is wrong."""
