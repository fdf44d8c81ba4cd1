"""Simplestreams: the format image catalogues are published in, read and written.

``model`` what documents and records look like; ``constraint`` which images somebody wants; ``sources`` where documents come from;
``signing`` who vouches for them; ``reader`` finds images; ``writer`` and ``merge`` publish image ids; ``tree`` walks catalogues of
downloads; ``validate`` asks whether a site's catalogue has what it needs.

``compat=True`` on a function gives the behaviour of the original this follows, its faults included: a bad signature falls back to
unsigned data, the last error of several sources is told, versions are written year-day-month, merging forgets other streams.
"""
