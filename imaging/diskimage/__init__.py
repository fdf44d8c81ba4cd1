"""Virtual disk formats, read as extents."""
