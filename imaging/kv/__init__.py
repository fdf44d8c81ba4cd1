"""Embedded and distributed key/value stores behind one contract (:mod:`imaging.kv.base`)."""
