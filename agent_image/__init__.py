"""agent-image: the daemon on each hypervisor that owns the images, volumes, snapshots, clones and guest disks of one pool."""
