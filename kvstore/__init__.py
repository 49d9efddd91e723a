"""The store of cached state: layouts and accounting (pure), pools (torch). Nothing here knows what a row means."""
