"""A worker's host: sessions, scheduler, who owns which page. Never imports torch; the rank beside it does."""
