"""Memory below the device, and the store below that: what goes there, and what comes back."""
