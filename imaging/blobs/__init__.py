"""Content-addressed blob stores behind one contract (:mod:`imaging.blobs.base`)."""
