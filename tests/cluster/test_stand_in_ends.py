"""A stand-in that is left ends at once, whatever it was about to do."""

import asyncio

from tests.cluster.stand_in.cluster import StandIn
from tests.cluster.stand_in.controllers import BY_NAME

CONFIG_MAP = BY_NAME["ConfigMap"]


async def test_a_write_just_before_the_end_does_not_keep_the_controllers_going():
    """They are woken by the write and cancelled in the same turn of the loop."""
    async with asyncio.timeout(20):
        async with StandIn() as cluster:
            await asyncio.sleep(0.1)  # the controllers wait to be woken
            cluster.objects.create(CONFIG_MAP, "default", {"metadata": {"name": "late"}})
