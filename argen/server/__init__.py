"""The HTTP side of argen: OpenAI's images API, A1111's, the queue, and the guard before them."""
