"""State lent to other workers, and read from them, by its keys."""
