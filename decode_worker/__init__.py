"""The decode role: leased state goes in, tokens come out. A worker's host does the rest."""
