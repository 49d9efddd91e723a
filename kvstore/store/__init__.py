"""The store tier: pages and tails in Redis, shared by all workers. No torch.

`contract` says what a store is, `redis_store` is one; `reading`, `writing` and `health` are its parts, `servers` and
`connections` how it reaches Redis; `value` and `names` what stands in it; `quota` what a tenant may have; `admin` and
`cli` what an operator sees of it; `embedded` a server for one machine.
"""
