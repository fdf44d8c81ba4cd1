"""What two processes agree on: messages, JSON-RPC, dispatch, and the HTTP server and client that carry them."""
