"""The ground every part of Rorqual stands on: ids, clock, errors, configuration, contracts. Never imports torch."""

__version__ = "0.1.0"
