"""The zfs driver: StorageDriver on libzfs_core; docs/zfs.md tells how it works."""

from agent_image.drivers.zfs.driver import ZfsDriver

__all__ = ["ZfsDriver"]
