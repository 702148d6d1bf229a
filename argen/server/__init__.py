"""The HTTP side of argen: OpenAI's images API, A1111's, the queue's own API, and the guard before them."""
