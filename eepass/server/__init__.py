"""A server that speaks the OpenAI protocol to many clients at once, over one engine loop."""
