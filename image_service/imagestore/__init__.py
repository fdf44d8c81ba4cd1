"""The content store for container images: app containers (ACI) by image id, name and labels, OCI images by digest and tag.

Public: :class:`~image_service.imagestore.store.ImageStore` (``Open``/``NewStore`` of those who know the original),
:class:`~image_service.imagestore.fetching.Downloader` and :class:`~image_service.imagestore.oci_images.OciImages`.
Any number of processes may have the same store open.
"""
