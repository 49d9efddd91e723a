"""The HTTP gateway: OpenAI-style requests in, generations asked of a Generator, JSON and event streams out.

`server` holds the routes, `schema` what bodies may say, `requests` what they mean, `chat` and `completions`
how answers look, `http1` the sockets. It decides nothing about placement and never sees a worker.
"""
