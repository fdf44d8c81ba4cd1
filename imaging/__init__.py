"""What images are made of: errors, digests, names, blobs, key/value stores, send streams and disk formats.

Nothing here knows of daemons, HTTP or JSON-RPC. Everything is synchronous; a daemon calls it through
:class:`imaging.threads.Offload` so that its event loop never blocks.
"""
