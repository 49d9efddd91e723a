"""The router: HTTP gateway, gRPC Generate, prompt encoding, placement, fleet. Never imports torch or the engine."""
