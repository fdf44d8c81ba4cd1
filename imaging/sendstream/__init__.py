"""ZFS send streams of volumes, read and written without ZFS.

Pure modules, which do no input or output:

* :mod:`~imaging.sendstream.records` - record types, their layouts, feature flags, limits
* :mod:`~imaging.sendstream.backend` - what the inner loops run on: an optional C extension, or numpy
* :mod:`~imaging.sendstream.checksum` - Fletcher-4
* :mod:`~imaging.sendstream.nvlist` - the name/value lists in BEGIN payloads
* :mod:`~imaging.sendstream.blocks` - compression of single blocks
* :mod:`~imaging.sendstream.microzap` - the block that holds the volume's size
* :mod:`~imaging.sendstream.reader` - bytes to records whose checksums hold
* :mod:`~imaging.sendstream.writer` - records to bytes
* :mod:`~imaging.sendstream.validator` - the rules a stream must keep before anything may receive it
* :mod:`~imaging.sendstream.package`, :mod:`~imaging.sendstream.resume` - what surrounds streams

With input and output: :mod:`~imaging.sendstream.volume` (stream to disk image and back).
"""
