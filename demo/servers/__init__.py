"""Servers of a cluster on loopback, from Debian's packages: etcd, Swift with its S3 API, haproxy. The tests use them too."""
