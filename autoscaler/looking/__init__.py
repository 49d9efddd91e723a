"""Looking: sessions with workers, routers' metrics, and the observation made of both. Decides nothing."""
