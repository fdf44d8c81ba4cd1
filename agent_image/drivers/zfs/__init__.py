"""The zfs driver: StorageDriver on libzfs_core. ``driver.ZfsDriver`` is what others use; docs/zfs.md tells how it works."""
