"""Measurements that take longer than a test may: `make truth` and `make bench`."""
