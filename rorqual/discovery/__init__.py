"""Where workers are: addresses from a list, from DNS, from a file, or from Kubernetes' EndpointSlices.

`sources` reads the text of an option into a source; a source runs until cancelled and tells the whole set of addresses
whenever it changes. Used by the router's fleet and by the autoscaler, which decide what to do about it. A source that
cannot look keeps what it knew, says why in `last_error`, and goes on trying.
"""

from rorqual.discovery.sources import AddressSource, SourceSpec, make_source, parse_source

__all__ = ["AddressSource", "SourceSpec", "make_source", "parse_source"]
